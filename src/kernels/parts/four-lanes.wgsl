// Elementwise kernels, four elements to a thread: 16 bytes with each load. n counts the fours.

alias Lane = vec4f;
