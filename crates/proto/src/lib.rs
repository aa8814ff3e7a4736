//! The contracts that Wrenn's processes share.
//!
//! - [`hostagent`]: what a control plane asks of a host agent (Connect RPC).
//! - [`process`] and [`filesystem`]: the guest agent's services (Connect RPC), as the E2B SDKs know them.
//! - [`run`]: collected runs, between host and guest agent alone.
//! - [`guest`]: the guest agent's plain HTTP contract, shared by host and guest.
//! - [`rest`]: the bodies of the public REST API, shared by the control plane and the client.
//! - [`id`]: the prefixed text form of entity ids.
#![forbid(unsafe_code)]

#[expect(missing_docs, reason = "generated; the .proto files hold the documentation")]
#[allow(clippy::all, unused_qualifications, reason = "generated code")]
mod generated {
    connectrpc::include_generated!("_wrenn.rs");
}

pub mod guest;
pub mod id;
pub mod rest;

pub use generated::filesystem;
pub use generated::process;
pub use generated::wrenn::guest::v1 as run;
pub use generated::wrenn::hostagent::v1 as hostagent;
