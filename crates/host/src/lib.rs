//! The host agent: runs the microVMs of one machine.

pub mod net;
