# One image for both processes: the command says which.
FROM python:3.12.14-slim-bookworm AS build
WORKDIR /src
COPY requirements/entra.txt requirements/entra.txt
RUN python -m venv /opt/relay \
 && /opt/relay/bin/pip install --no-cache-dir --require-hashes -r requirements/entra.txt
COPY pyproject.toml README.md LICENSE ./
COPY relay relay
COPY api api
COPY worker worker
COPY cli cli
COPY emulator emulator
RUN /opt/relay/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.12.14-slim-bookworm
RUN useradd --system --uid 10001 --no-create-home relay
COPY --from=build /opt/relay /opt/relay
ENV PATH=/opt/relay/bin:$PATH PYTHONUNBUFFERED=1 RELAY_HOST=0.0.0.0 RELAY_LOG_FORMAT=json
USER 10001
WORKDIR /tmp
EXPOSE 8000
CMD ["python", "-m", "api"]
