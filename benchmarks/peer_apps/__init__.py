"""Other servers, each serving the deploy form as a plain PyTorch module.

Every module here runs with its own interpreter: `python -m benchmarks.peer_apps.NAME FOLDER PORT`.
Each is set up as its documents advise, with batching wherever the server has it. All take the
leanest body that the server's own interface allows and answer raw float32 logits, except where the
server prescribes a protocol.
"""
