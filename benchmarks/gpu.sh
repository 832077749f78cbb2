#!/usr/bin/env bash
# All tests that need a GPU and all benchmarks on one card, in under eight minutes; JSON and logs go into one folder.
#
#     benchmarks/gpu.sh [FOLDER]        # result/gpu unless given; PYTHON names another interpreter
#
# Every part runs whatever became of the others; the exit code is 1 if one failed. A part that takes too long is ended.
set -u
cd "$(dirname "$0")/.."
folder=${1:-result/gpu}
python=${PYTHON:-python}
mkdir -p "$folder"
failed=0

part() { # part NAME SECONDS COMMAND...: runs it, keeps its output, says how it ended
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout "$limit" "$@" > "$folder/$name.log" 2>&1
    local code=$?
    echo "$name: exit code $code, $((SECONDS - start)) s"
    tail -n 15 "$folder/$name.log"
    [ $code -eq 0 ] || failed=1
}

part tests 120 "$python" -m pytest -q -m gpu
part retrieval-coco 80 "$python" -m benchmarks.retrieval --device cuda --queries 5000 --database 117218 --classes 80 \
    --no-baseline --repeats 3 --output "$folder/retrieval-coco.json"
part retrieval 30 "$python" -m benchmarks.retrieval --device cuda --repeats 3 --output "$folder/retrieval.json"
part training-mith 100 "$python" -m benchmarks.training --device cuda --compile --output "$folder/training-mith.json"
for method in DCMHT DSPH; do
    part "training-${method,,}" 50 "$python" -m benchmarks.training --device cuda --method "$method" --repeats 2 \
        --output "$folder/training-${method,,}.json"
done
part loading 45 "$python" -m benchmarks.loading --pictures 1000 --repeats 2 --output "$folder/loading.json"
exit $failed
