# vLLM's OpenAI-compatible server with attribution, for NVIDIA GPUs.
#   docker build -t vllm-flashtrace .
#   docker run --gpus all --ipc=host -p 8000:8000 vllm-flashtrace MODEL [any vllm serve option]
FROM vllm/vllm-openai:v0.32.0 AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY vllm_flashtrace vllm_flashtrace
COPY patches patches
RUN python3 -m pip wheel --no-deps --wheel-dir /wheels .

FROM vllm/vllm-openai:v0.32.0
COPY --from=build /wheels /wheels
# The image has vLLM, torch and nearly everything else; only what is missing is installed.
RUN python3 -m pip install --no-cache-dir /wheels/*.whl && rm -r /wheels
ENTRYPOINT ["vllm-flashtrace", "serve"]
