# curv on the CPU. Build: docker build -t curv .   Run: docker run --rm -v "$PWD:/work" curv analyze run/
FROM python:3.12-slim
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE /src/
COPY curvcli /src/curvcli
COPY docs/man /src/docs/man
RUN pip install --no-cache-dir "/src[data]" && rm -r /src
RUN useradd --create-home curv
USER curv
WORKDIR /work
ENTRYPOINT ["curv"]
