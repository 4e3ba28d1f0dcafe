# `make image`: vLLM's own image with the wheel in `dist` installed. Needs the NVIDIA container toolkit to run.
FROM vllm/vllm-openai:v0.32.0
COPY dist/*.whl /tmp/
# What vLLM was built with stays as it is: a wheel that needs another version fails here.
RUN pip list --format=freeze | grep -E "^(vllm|torch|transformers)==" > /tmp/kept.txt \
    && pip install --no-cache-dir --constraint /tmp/kept.txt /tmp/*.whl \
    && rm /tmp/kept.txt /tmp/*.whl \
    && useradd --create-home --uid 10001 steer
# A number, so that Kubernetes' `runAsNonRoot` can tell.
USER 10001
EXPOSE 8000
ENTRYPOINT ["steer", "serve"]
