#!/bin/sh
# lm-eval's tasks on a running `fourge serve`, through /v1/completions with echo and logprobs.
#
#   pip install 'lm_eval[api]'
#   fourge serve out/tiny-glm-NVFP4 &
#   scripts/lm_eval.sh out/tiny-glm-NVFP4 hellaswag,arc_easy [URL] [lm-eval options...]
#
# Prompts go as token ids of the checkpoint's own tokenizer, so that nothing is tokenized twice.
set -eu
checkpoint=$1
tasks=$2
url=${3:-http://127.0.0.1:8000}
[ $# -lt 3 ] && shift 2 || shift 3
exec lm_eval --model local-completions --tasks "$tasks" --batch_size 1 \
    --model_args "model=$(basename "$checkpoint"),base_url=$url/v1/completions,tokenizer=$checkpoint,tokenized_requests=True,num_concurrent=8,max_length=4096" "$@"
