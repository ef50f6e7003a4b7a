"""Other servers, each serving the deploy form as a plain PyTorch module.

Every module here runs with its own interpreter: `python -m benchmarks.peer_apps.NAME FOLDER PORT`.
Each is set up as its documents advise. All take the leanest body that the server's own interface
allows and answer raw float32 logits, except where the server prescribes a protocol. Batching is on wherever the server has it.
"""
