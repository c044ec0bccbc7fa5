# docker build -t nanochat . && docker run --rm -v "$PWD:/work" nanochat train --preset quickstart --set data.source=/work/src
# On a GPU: --build-arg TORCH= (the default index has CUDA builds), and run with --gpus all.
FROM python:3.12-slim
ARG TORCH="--extra-index-url https://download.pytorch.org/whl/cpu"
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
COPY . /opt/nanochat
RUN pip install --no-cache-dir $TORCH "/opt/nanochat[llama-cpp]"
RUN useradd --create-home somebody && mkdir /work && chown somebody /work
USER somebody
WORKDIR /work
ENTRYPOINT ["nanochat"]
