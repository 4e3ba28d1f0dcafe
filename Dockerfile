# `make image`: vLLM's own image with the wheel in `dist` installed. Needs the NVIDIA container toolkit to run.
FROM vllm/vllm-openai:v0.32.0
COPY dist/*.whl /tmp/
RUN pip install --no-cache-dir /tmp/*.whl && rm /tmp/*.whl
EXPOSE 8000
ENTRYPOINT ["steer", "serve"]
