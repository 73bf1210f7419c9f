#!/usr/bin/env bash
# Where the time goes on the CPU, forward and step: ranges by torch's profiler, functions by Linux perf.
#
#   benchmarks/nsight/cpu.sh [OPTIONS]
#
# OPTIONS are those of `perceiver-fast profile`, but --tool, --pass, --device, --dry-run and --kernel; paths are relative to the root.
# PYTHON (default: python3) runs it. Exit code: 0, or 2 when perf is not there; torch's tables come first.
set -euo pipefail
cd "$(dirname "$0")/../.."
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' benchmarks/nsight/cpu.sh && exit ;; esac
for tool in torch perf; do
    for pass in forward step; do
        "${PYTHON:-python3}" -m perceiver_fast profile --tool "$tool" --pass "$pass" --device cpu "$@"
    done
done
