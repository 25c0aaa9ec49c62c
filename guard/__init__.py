"""guard: what is measured while a request is generated, and what it means.

Attention from generated tokens to prompt tokens becomes one Gram matrix per layer (`gram`), the Gram becomes a few
signals (`signals`), the signals are compared with what is normal for this very model (`profile`) by a test that keeps
its false-alarm promise over the whole request (`sequential`), and the outcome is a `Verdict` (`verdict`).
`probes/` is where an engine is touched, `kernels/` is the arithmetic that runs inside it.

Legend, for every tensor of the project: R requests in a batch, L layers, H query heads, H_kv key/value heads, D head
size, T_p prompt tokens, T_g generated tokens, S slots, K signals, C checkpoints, N variants, r LoRA rank.
"""
