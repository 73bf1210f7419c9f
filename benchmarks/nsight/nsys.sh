#!/usr/bin/env bash
# A GPU's timeline of forward and of step, by Nsight Systems, and tables of kernels and ranges.
#
#   benchmarks/nsight/nsys.sh [OPTIONS]
#
# OPTIONS are those of `perceiver-fast profile`, but --tool and --pass; --dry-run prints the command lines.
# PYTHON (default: python3) runs it. Exit code: 0, or 2 when nsys or a GPU is not there.
set -euo pipefail
cd "$(dirname "$0")/../.."
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' benchmarks/nsight/nsys.sh && exit ;; esac
for pass in forward step; do
    "${PYTHON:-python3}" -m perceiver_fast profile --tool nsys --pass "$pass" "$@"
done
