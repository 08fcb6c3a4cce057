```bash
export SGLANG_ENABLE_SPEC_V2=1      # overlap of draft and verification

python -m sglang.launch_server --model zai-org/GLM-5-FP8 \
  --tp 8 --dp 8 --enable-dp-attention \
  --nnodes 2 --node-rank 0 --dist-init-addr <MASTER_IP>:5000 \
  --speculative-algorithm EAGLE \
  --speculative-num-steps 3 \
  --speculative-eagle-topk 1 \
  --speculative-num-draft-tokens 4
```
