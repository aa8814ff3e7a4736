//! The guest's files: paths, descriptions of entries, the RPC service and watching.

pub(crate) mod entry;
pub(crate) mod paths;
pub(crate) mod service;
pub(crate) mod tree;
pub(crate) mod watch;
