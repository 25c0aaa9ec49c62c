"""The whole loop on one machine, told in the terminal and measured on the way (`headguard demo`)."""
