# SPDX-License-Identifier: Apache-2.0
# Training on NVIDIA GPUs: make images, then
#   docker run --gpus all --volume "$PWD/runs:/hmf/runs" hmf-train prime quickstart
# The whole python image, not the slim one: Triton compiles its launchers with the C compiler at run time.
FROM python:3.12
WORKDIR /hmf
COPY . .
ENV HMF_INSTALL_FOR=gpu PIP_NO_CACHE_DIR=1
RUN make setup-train
ENTRYPOINT [".venv/bin/hmf"]
CMD ["--help"]
