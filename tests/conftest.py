"""What every test shares: one torch thread, so that tests on two cores do not fight."""

import torch

torch.set_num_threads(1)
