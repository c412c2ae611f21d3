# SPDX-License-Identifier: Apache-2.0
# Serving by vLLM on NVIDIA GPUs: make images, then
#   docker run --gpus all --publish 127.0.0.1:8000:8000 --env VLLM_API_KEY --volume "$PWD/runs/quickstart/model:/model" hmf-serve
# --build-arg TARGET=cpu builds it for machines without one. Inside, the server listens on all addresses; who reaches it
# is decided by --publish.
FROM python:3.12
ARG TARGET=gpu
WORKDIR /hmf
COPY . .
ENV HMF_INSTALL_FOR=${TARGET} PIP_NO_CACHE_DIR=1
RUN make setup-serve
EXPOSE 8000
ENTRYPOINT [".venv/bin/hmf"]
CMD ["serve", "/model", "--", "--host", "0.0.0.0"]
