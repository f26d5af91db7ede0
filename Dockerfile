# The package with MaxText: docker build -t maxtext-ling2 . && docker run --rm -v "$PWD/work:/work" maxtext-ling2 demo
# tests/test_dockerfile.py runs these commands in an empty environment.
FROM python:3.12-slim
COPY pyproject.toml README.md LICENSE NOTICE /src/
COPY site_files /src/site_files
COPY maxtext_ling2 /src/maxtext_ling2
RUN pip install -c /src/maxtext_ling2/constraints.txt '/src[tpu]'
RUN JAX_PLATFORMS=cpu maxtext-ling2 doctor
WORKDIR /work
ENTRYPOINT ["maxtext-ling2"]
CMD ["doctor"]
