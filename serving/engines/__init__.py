"""Engines: what generates and measures. The gateway reaches each of them over HTTP (`client`), the embedded one too
(`transport` calls its app in process), so there is one code path whatever the engine."""
