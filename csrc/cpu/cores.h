// How many processors torch's threads have.
#pragma once

namespace perceiver_fast {

// Of the threads that a parallel region of the calling thread runs on, how many can run at once: their number, or that of
// the processors that they may use, if these are fewer. The calling thread's processors are looked at again every few
// hundredths of a second, and the others' where those have changed, since a process may be given others at any time. Where the system does not tell, the number of threads.
int team_cores();

}  // namespace perceiver_fast
