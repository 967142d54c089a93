// Elementwise kernels, four elements to a thread: a GPU then moves 16 bytes with each load. n counts the fours.

alias Lane = vec4f;
