//! Every suite a second time, on PostgreSQL: `common` picks the database by this binary's name.
#![expect(
    clippy::duplicate_mod,
    reason = "each suite brings its own `common`, as it does when it is a binary by itself"
)]

#[path = "api.rs"]
mod api;
#[path = "events.rs"]
mod events;
#[path = "lifecycle.rs"]
mod lifecycle;
#[path = "sockets.rs"]
mod sockets;
