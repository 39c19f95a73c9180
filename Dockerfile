# The bundle with what it needs, and nothing else; research only, not for clinical use.
#   docker build -t rt-dose .                                                                   CPU
#   docker build -t rt-dose --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .    CUDA (run with --gpus all)
#   docker run --rm -v "$PWD/data:/data:ro" -v "$PWD/results:/results" rt-dose
FROM python:3.11-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 MPLCONFIGDIR=/tmp/matplotlib
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/rt_ct_dose_prediction

# Packages first: they change less often than the code. The versions are those of the metadata.
COPY bundle/configs/metadata.json configs/metadata.json
RUN python -c "import json; m = json.load(open('configs/metadata.json')); \
pins = {'monai': m['monai_version'], 'torch': m['pytorch_version'], 'numpy': m['numpy_version']}; \
pins |= m['required_packages_version']; \
print('\n'.join(f'{name}=={version}' for name, version in pins.items()))" > requirements.txt \
    && pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" \
        "$(grep '^torch==' requirements.txt)${TORCH_INDEX/*\//+}" \
    && pip install --no-cache-dir -r requirements.txt \
    && pip install --no-cache-dir --no-deps --force-reinstall \
        "opencv-python-headless==$(pip show opencv-python | sed -n 's/^Version: //p')"

COPY LICENSE ./
COPY bundle/configs configs
COPY bundle/docs docs
COPY bundle/models models
COPY custom custom

RUN useradd --create-home --uid 1000 planner && mkdir /data /results && chown planner /data /results
USER 1000
ENTRYPOINT ["python", "-m", "monai.bundle", "run"]
CMD ["inference", "--config_file", "configs/inference.json", "--dataset_dir", "/data", "--output_dir", "/results"]
