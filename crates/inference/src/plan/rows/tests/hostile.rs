//! Graphs whose rows look independent.
