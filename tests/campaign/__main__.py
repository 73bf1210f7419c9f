import sys
from .sweep import *
import time
def rep(s): pass
t=time.time()
s=Sweep(Run(sys.argv[1],sys.argv[2],{"PERCEIVER_FAST_CPU_ISA":sys.argv[2]}),int(sys.argv[3])).for_seconds(float(sys.argv[4]),2)
print(s.cases, s.seconds, s.total.counts)
import json
json.dump(s.failures,open(f"/tmp/f-{sys.argv[1]}-{sys.argv[2]}.json","w"))
for f in s.failures: 
    if f["kind"]!="beyond 2x": print(f["case"]["seed"],f["kind"],f["found"][:300])
