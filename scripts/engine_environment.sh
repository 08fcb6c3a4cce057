#!/usr/bin/env bash
# A throwaway environment in which an engine's argument parser and config objects run without a GPU:
#
#     scripts/engine_environment.sh vllm|sglang FOLDER
#
# The engine comes without its dependencies (they would bring CUDA, 10 GB); what its parser imports
# is installed beside it, with the CPU build of torch that constraints.txt pins. One environment
# cannot hold both engines. Then: FOLDER/bin/python scripts/make_catalogue.py, fourge ... --verify
# FOLDER/bin/python, and scripts/check_with_engines.py.
set -euo pipefail

engine=${1:?vllm or sglang}
folder=${2:?a folder that does not exist yet}
constraints=$(cd "$(dirname "$0")/.." && pwd)/constraints.txt

common=(aiohttp einops fastapi huggingface-hub msgspec numpy openai orjson partial-json-parser pillow
        prometheus-client psutil pybase64 pydantic python-multipart pyzmq requests sentencepiece
        setproctitle tiktoken torch uvicorn uvloop)
case $engine in
  vllm)
    release=vllm==0.33.0
    beside=(compressed-tensors==0.17.0 xgrammar==0.2.8 apache-tvm-ffi==0.1.11)
    own=('transformers>=5.16.1,<5.21' 'fastapi>=0.133,<0.137' 'openai>=2.25' anthropic blake3
         cachetools cbor2 cloudpickle depyf==0.20.0 'fastsafetensors>=0.3.3' httpx ijson jsonschema
         lark==1.2.2 'llguidance>=1.7,<1.8' lm-format-enforcer==0.11.3 loguru 'mcp>=2.2,<3'
         'mistral-common>=1.11.6' 'model-hosting-container-standards<1' opentelemetry-api
         opentelemetry-exporter-otlp opentelemetry-sdk opentelemetry-semantic-conventions-ai
         'oss-harmony>=0.0.11' outlines-core==0.2.14 'prometheus-fastapi-instrumentator>=8'
         'protobuf>=6.33.2' py-cpuinfo python-json-logger regex watchfiles)
    ;;
  sglang)
    release=sglang==0.5.23
    beside=(compressed-tensors==0.18.0 xgrammar==0.2.7 apache-tvm-ffi triton)
    own=(transformers==5.19.0 interegular IPython)
    ;;
  *) echo "usage: $0 vllm|sglang FOLDER" >&2; exit 2 ;;
esac

python3 -m venv "$folder"
pip=("$folder/bin/pip" --disable-pip-version-check install --quiet)
"${pip[@]}" -c "$constraints" "${common[@]}" "${own[@]}"
"${pip[@]}" --no-deps "$release" "${beside[@]}"
echo "$folder/bin/python has $release"
