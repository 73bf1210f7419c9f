// How many processors torch's threads have.
#pragma once

namespace perceiver_fast {

// Of the threads that a parallel region of the calling thread runs on, how many can run at once: their number, or that of
// the processors that they may use, if these are fewer. Looked at again every few hundredths of a second, since a process may
// be given other processors at any time. Where the system does not tell, the number of threads.
int team_cores();

}  // namespace perceiver_fast
