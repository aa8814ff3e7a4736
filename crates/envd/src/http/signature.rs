//! Signed URLs of `/files`, for callers that must not hold the access token.
//!
//! `v1_` + base64 without padding of the SHA-256 of `path:operation:user:token`, with `:expiry` at the end when
//! the URL expires. Path and user are taken as they stand in the URL.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use http::HeaderMap;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{Failure, carries_token, constant_time_equal};

/// What a signature permits.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Operation {
    Read,
    Write,
}

/// The query of `/files`.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct FilesQuery {
    pub(crate) path: Option<String>,
    pub(crate) username: Option<String>,
    signature: Option<String>,
    signature_expiration: Option<String>,
}

impl FilesQuery {
    /// Admits the request: no token set, the token in its header, or a valid signature.
    pub(crate) fn authorize(
        &self,
        headers: &HeaderMap,
        token: Option<&str>,
        operation: Operation,
    ) -> Result<(), Failure> {
        let Some(token) = token else { return Ok(()) };
        if carries_token(headers, token) {
            return Ok(());
        }
        let Some(signature) = &self.signature else {
            return Err(Failure::unauthorized("missing signature query parameter"));
        };
        let expiry = self
            .signature_expiration
            .as_deref()
            .map(|text| {
                text.parse::<i64>()
                    .map_err(|_| Failure::bad_request("signature_expiration is no integer"))
            })
            .transpose()?;
        let path = self.path.as_deref().unwrap_or_default();
        let user = self.username.as_deref().unwrap_or_default();
        let expected = sign(path, operation, user, token, expiry);
        if !constant_time_equal(signature.as_bytes(), expected.as_bytes()) {
            return Err(Failure::unauthorized("invalid signature"));
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| now.as_secs());
        if expiry.is_some_and(|expiry| u64::try_from(expiry).unwrap_or(0) < now) {
            return Err(Failure::unauthorized("signature is already expired"));
        }
        Ok(())
    }
}

fn sign(path: &str, operation: Operation, user: &str, token: &str, expiry: Option<i64>) -> String {
    let operation = match operation {
        Operation::Read => "read",
        Operation::Write => "write",
    };
    let mut text = format!("{path}:{operation}:{user}:{token}");
    if let Some(expiry) = expiry {
        text.push_str(&format!(":{expiry}"));
    }
    format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(text.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0";
    const SIGNATURE: &str = "v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E";

    fn query(expiry: Option<i64>, signature: &str) -> FilesQuery {
        FilesQuery {
            path: Some("hello.txt".into()),
            username: Some("user".into()),
            signature: Some(signature.into()),
            signature_expiration: expiry.map(|expiry| expiry.to_string()),
        }
    }

    #[test]
    fn the_published_vector() {
        assert_eq!(sign("hello.txt", Operation::Read, "user", TOKEN, None), SIGNATURE);
        let headers = HeaderMap::new();
        assert!(
            query(None, SIGNATURE)
                .authorize(&headers, Some(TOKEN), Operation::Read)
                .is_ok()
        );
        assert!(
            query(None, SIGNATURE)
                .authorize(&headers, Some(TOKEN), Operation::Write)
                .is_err()
        );
        assert!(
            query(None, SIGNATURE)
                .authorize(&headers, Some("other"), Operation::Read)
                .is_err()
        );
        assert!(
            query(Some(1), SIGNATURE)
                .authorize(&headers, Some(TOKEN), Operation::Read)
                .is_err()
        );
    }

    #[test]
    fn an_expired_signature_says_so() {
        let expired = sign("hello.txt", Operation::Read, "user", TOKEN, Some(1));
        let failure = query(Some(1), &expired).authorize(&HeaderMap::new(), Some(TOKEN), Operation::Read);
        let failure = failure.expect_err("it is expired");
        assert_eq!(
            (failure.status.as_u16(), failure.message.as_str()),
            (401, "signature is already expired")
        );
        let future = sign("hello.txt", Operation::Read, "user", TOKEN, Some(1 << 40));
        assert!(
            query(Some(1 << 40), &future)
                .authorize(&HeaderMap::new(), Some(TOKEN), Operation::Read)
                .is_ok()
        );
    }
}
