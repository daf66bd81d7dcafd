# The API: no torch, starts in a second. Build from the repository's root:
#   docker build -f docker/api.Dockerfile -t heft-api .
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/heft
COPY pyproject.toml constraints.txt README.md ./
COPY api api
COPY store store
COPY worker worker
COPY heft_engine heft_engine
COPY cli cli
COPY migrations migrations
RUN /opt/heft/bin/pip install --no-cache-dir -c constraints.txt '.[api,s3]'

FROM python:3.11-slim-bookworm
COPY --from=build /opt/heft /opt/heft
RUN useradd --system --uid 10001 --home-dir /var/lib/heft --create-home heft
USER heft
ENV PATH=/opt/heft/bin:$PATH PYTHONUNBUFFERED=1 HEFT_HOST=0.0.0.0 HEFT_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
CMD ["heft", "api"]
