# syntax=docker/dockerfile:1
# Foldserve as an image:
#
#   docker build -t foldserve .                        serves on the CPU, with PyTorch's CPU build
#   docker build -t foldserve:cuda --target cuda .     serves on an NVIDIA GPU; several GB larger
#
# The build stages install into /opt/venv what the lock says; the last stages carry that folder alone. Packages come
# from wherever pip is told to look. The environment of a build does not reach RUN, so say it by build arguments:
#   TORCH_INDEX  where PyTorch's CPU build is to be found; empty where PIP_OPTIONS say it
#   PIP_OPTIONS  further options of `pip install`: --find-links, --index-url, --no-index, ...
# A folder `wheels` in the build context is looked at first.

ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY requirements.lock wheel[s] wheels/
COPY pyproject.toml README.md LICENSE requirements.lock deploy/image/install.sh ./
COPY service/__init__.py service/

FROM build AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PIP_OPTIONS=""
RUN sh install.sh needs postgres,grpc --find-links wheels ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} ${PIP_OPTIONS}
COPY service service
RUN sh install.sh code

FROM build AS build-cuda
ARG PIP_OPTIONS=""
RUN sh install.sh needs postgres,grpc --find-links wheels ${PIP_OPTIONS}
COPY service service
RUN sh install.sh code

FROM ${PYTHON_IMAGE} AS runtime
LABEL org.opencontainers.image.title="Foldserve" \
      org.opencontainers.image.description="Folds re-parameterizable checkpoints and serves them" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN mkdir /data && chown 10001:10001 /data
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data \
    OMP_WAIT_POLICY=PASSIVE \
    FOLDSERVE_HOST=0.0.0.0 \
    FOLDSERVE_PORT=8000 \
    FOLDSERVE_DATA_DIR=/data \
    FOLDSERVE_LOG_FORMAT=json
# Everything that is written goes below /data. As the working directory it is also where Python puts temporary files
# if /tmp cannot be written, so a read-only root file system needs nothing more than this volume.
WORKDIR /data
VOLUME /data
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['FOLDSERVE_PORT'] + '/health/live', timeout=4)"]
ENTRYPOINT ["foldserve"]
CMD ["serve"]

FROM runtime AS cuda
ENV FOLDSERVE_DEVICE=cuda
COPY --from=build-cuda /opt/venv /opt/venv

# Last, so that a build without a target makes it.
FROM runtime AS cpu
ENV FOLDSERVE_DEVICE=cpu
COPY --from=build-cpu /opt/venv /opt/venv
