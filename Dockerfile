# smsd with nothing but its runtime: no compiler, no pip, no embedded Postgres, not root.
#   docker build -t smsd .
#   docker run --env-file smsd.env smsd migrate
#   docker run --env-file smsd.env -p 8080:8080 smsd
# It listens beyond loopback, so it refuses to start without SMSD_WEBHOOK_SECRET; it needs
# SMSD_DATABASE_URL too. Allow it to stop: docker stop --time 45, terminationGracePeriodSeconds: 45.

FROM python:3.13-slim-trixie AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# Everything the lock names is fetched by hash into /wheels; from there on nothing is downloaded
# (so hadolint's wish for pinned versions is met), and the image takes only what smsd depends on.
COPY requirements.lock ./
# hadolint ignore=DL3013
RUN pip wheel --require-hashes --wheel-dir /wheels --requirement requirements.lock \
 && pip install --no-index --find-links /wheels hatchling
COPY pyproject.toml README.md LICENSE ./
COPY smsd smsd
COPY sql sql
# hadolint ignore=DL3013
RUN pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheels . \
 && python -m venv --without-pip /opt/smsd \
 && pip --python /opt/smsd/bin/python install --no-index --find-links /wheels smsd

FROM python:3.13-slim-trixie
COPY --from=build /opt/smsd /opt/smsd
RUN useradd --uid 10001 --user-group --home-dir /var/lib/smsd --create-home smsd
ENV PATH=/opt/smsd/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SMSD_DATA_DIR=/var/lib/smsd \
    SMSD_HOST=0.0.0.0 \
    SMSD_PORT=8080
WORKDIR /var/lib/smsd
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-c", "\
import os, urllib.request as r; \
r.build_opener(r.ProxyHandler({})).open(f'http://127.0.0.1:{os.environ[\"SMSD_PORT\"]}/healthz', timeout=4)"]
ENTRYPOINT ["smsd"]
CMD ["serve"]
