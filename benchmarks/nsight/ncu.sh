#!/usr/bin/env bash
# Metrics of this package's kernels by Nsight Compute, forward and step, and a line a kernel: what it is bound by.
#
#   benchmarks/nsight/ncu.sh [OPTIONS]
#
# OPTIONS are those of `perceiver-fast profile`, but --tool, --pass and --out; --kernel grid_attention takes that op's
# kernels alone, --dry-run prints the command lines. Kernels and metrics: perceiver_fast/insight/ncu.py.
# OUT (default: out/ncu) is where reports, tables (*.csv) and summaries (*.json) go; PYTHON (default: python3) runs it.
# Exit code: 0, or 2 when ncu or a GPU is not there.
set -euo pipefail
cd "$(dirname "$0")/../.."
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' benchmarks/nsight/ncu.sh && exit ;; esac
python=${PYTHON:-python3} out=${OUT:-out/ncu}
for pass in forward step; do
    "$python" -m perceiver_fast profile --tool ncu --pass "$pass" --out "$out" "$@"
done
case " $* " in *" --dry-run "*) exit ;; esac
for table in "$out"/*.csv; do
    "$python" -m benchmarks.nsight.summarize "$table"
    "$python" -m benchmarks.nsight.summarize "$table" --json > "${table%.csv}.json"
done
