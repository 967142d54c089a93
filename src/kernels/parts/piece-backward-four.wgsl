// cross-entropy-piece-backward.wgsl, four elements to a lane; V and n count lanes

alias Lane = vec4f;

const LANE: u32 = 4u;

fn one_hot(word: u32, label: u32) -> Lane { return select(Lane(), Lane(1.0), vec4u(word, word + 1u, word + 2u, word + 3u) == vec4u(label)); }
