"""The Open Inference Protocol, version 2: over REST under `/v2`, and over gRPC.

rest, rpc       one transport each: bytes to `InferRequest`, `InferAnswer` to bytes
messages        the request and the answer, as neither transport knows them
datatypes       the protocol's element types as NumPy's and PyTorch's
infer           what a request asks for, computed the way that every prediction is
models          what is served: metadata, readiness, configuration, statistics
repository      the index, loading and unloading
"""
