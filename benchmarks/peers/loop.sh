#!/bin/bash
# Relaunches both torchruns on a new port as soon as one of them ends. Arguments: PYTHON SCRIPT FOLDER
python=$1 script=$2 folder=$3
port=$((20000 + RANDOM % 9000))
while true; do
  port=$((port + 1))
  pids=()
  for node in 0 1; do
    setsid "$python" -m torch.distributed.run --nnodes=2 --node-rank=$node --nproc-per-node=2 --rdzv-backend=static \
      --master-addr=127.0.0.1 --master-port=$port "$script" >>"$folder/node$node.log" 2>&1 &
    pids+=($!)
    echo $! >"$folder/node$node.pid"
  done
  wait -n "${pids[@]}"
  kill -TERM "${pids[@]}" 2>/dev/null # torchrun passes it on to its ranks
  wait
done
