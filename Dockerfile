# fedlora for the CPU: `docker build --tag fedlora:local .`; compose.yaml runs a federation of three nodes from it.
FROM python:3.11-slim AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
# The tested set; torch from its own index, whose wheels for the CPU are a tenth of those with CUDA.
COPY constraints.txt /tmp/
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt \
    --index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple torch
COPY --from=wheel /wheels /tmp/wheels
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt --find-links /tmp/wheels 'fedlora[deploy,report]'
RUN useradd --create-home --uid 1000 fedlora && install --directory --owner fedlora /federation
USER 1000
WORKDIR /home/fedlora
CMD ["fedlora", "--help"]
