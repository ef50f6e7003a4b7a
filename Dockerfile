# syntax=docker/dockerfile:1
# Foldserve in two stages: the first installs into /opt/venv from the lock, the second carries that folder alone.
#
# Packages come from wherever pip is told to look. The environment of the build does not reach RUN, so say it by
# build arguments:
#   FIND_LINKS   a folder of wheels to prefer, such as one with PyTorch's CPU wheel. Without it, the default index
#                gives PyTorch's default build, which on x86-64 Linux brings CUDA along.
#   PIP_OPTIONS  further options of `pip install`: --index-url, --extra-index-url, --no-index, ...
# A folder `wheels` in the build context is always looked at, so `FIND_LINKS` is for folders mounted into the build.

ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ARG FIND_LINKS=/wheels
ARG PIP_OPTIONS=""
WORKDIR /src
RUN python3 -m venv /opt/venv
COPY requirements.lock wheel[s] /wheels/
RUN /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check ${PIP_OPTIONS} \
        --find-links /wheels --find-links "${FIND_LINKS}" -c /wheels/requirements.lock \
        "$(grep '^torch==' /wheels/requirements.lock)" "$(grep '^setuptools==' /wheels/requirements.lock)"
# The dependencies before the code, so that a change of code does not install them again.
COPY pyproject.toml README.md LICENSE ./
COPY service/__init__.py service/
RUN /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check ${PIP_OPTIONS} \
        --find-links /wheels --find-links "${FIND_LINKS}" -c /wheels/requirements.lock --no-build-isolation .
COPY service service
RUN /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --no-index --no-deps \
        --no-build-isolation --force-reinstall . \
    && /opt/venv/bin/pip uninstall -y pip

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="Foldserve" \
      org.opencontainers.image.description="Folds re-parameterizable checkpoints and serves them" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/venv /opt/venv
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
