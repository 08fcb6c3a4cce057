# ---- Start SGLang server ----------------------------------------------------
export TORCH_CUDA_ARCH_LIST="10.0"
export SGL_ENABLE_JIT_DEEPGEMM=1
MODEL=zai-org/GLM-5-FP8
TP=8; PORT=8888; CONC=64
MAX_MODEL_LEN=131072
python3 -m sglang.launch_server \
--model-path=$MODEL \
--host=0.0.0.0 \
--port=$PORT \
--trust-remote-code \
--tensor-parallel-size=$TP \
--data-parallel-size 1 \
--expert-parallel-size 1 \
--tool-call-parser glm47 \
--reasoning-parser glm45 \
--kv-cache-dtype fp8_e4m3 \
--quantization fp8 \
--attention-backend nsa \
--nsa-decode-backend trtllm \
--nsa-prefill-backend trtllm \
--moe-runner-backend flashinfer_trtllm \
--cuda-graph-max-bs $CONC \
--max-running-requests $CONC \
--mem-fraction-static 0.85 \
--chunked-prefill-size 32768 \
--max-prefill-tokens 32768 \
--enable-flashinfer-allreduce-fusion \
--disable-radix-cache \
--stream-interval 30 \
--context-length $MAX_MODEL_LEN \
--enable-metrics \
--model-loader-extra-config '{"enable_multithread_load": true}' > "$SERVER_LOG" 2>&1 &
SERVER_PID=$!
echo "Server PID: $SERVER_PID"
