//! The files of the stand-in.

use std::path::Path as FsPath;

use axum::Json;
use axum::body::Body;
use axum::extract::{Multipart, Path, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use super::{Answer, Stub, refuse};

pub(super) async fn write(State(stub): State<Stub>, Path(id): Path<String>, mut form: Multipart) -> Answer {
    stub.known(&id)?;
    let path = form.next_field().await.unwrap().unwrap();
    assert_eq!(path.name(), Some("path"), "the path comes first");
    let path = path.text().await.unwrap();
    let mut field = form.next_field().await.unwrap().unwrap();
    let mut user = None;
    if field.name() == Some("user") {
        user = Some(field.text().await.unwrap());
        field = form.next_field().await.unwrap().unwrap();
    }
    let target = stub.file(&path, user.as_deref())?;
    if target.is_dir() {
        return Err(refuse(400, "invalid_request", &format!("{path} is a directory")));
    }
    std::fs::create_dir_all(target.parent().unwrap()).unwrap();
    assert_eq!(field.name(), Some("file"));
    let mut file = tokio::fs::File::create(&target).await.unwrap();
    loop {
        match field.chunk().await {
            Ok(Some(chunk)) => file.write_all(&chunk).await.unwrap(),
            Ok(None) => break,
            Err(error) => return Err(refuse(400, "invalid_request", &error.body_text())),
        }
    }
    file.flush().await.unwrap();
    Ok(StatusCode::NO_CONTENT.into_response())
}

pub(super) async fn read(
    State(stub): State<Stub>,
    Path(id): Path<String>,
    Json(body): Json<Value>,
) -> Answer {
    stub.known(&id)?;
    let path = body["path"].as_str().unwrap();
    if path == "/cut" {
        let chunks = [
            Ok(vec![b'x'; 1 << 20]),
            Err(std::io::Error::other("the guest died")),
        ];
        return Ok(Body::from_stream(futures::stream::iter(chunks)).into_response());
    }
    let source = stub.file(path, body["user"].as_str())?;
    match tokio::fs::File::open(&source).await {
        Ok(_) if source.is_dir() => Err(refuse(400, "invalid_request", &format!("{path} is a directory"))),
        Ok(file) => Ok(Body::from_stream(tokio_util::io::ReaderStream::new(file)).into_response()),
        Err(_) => Err(refuse(404, "not_found", &format!("{path} was not found"))),
    }
}

fn entry(path: &FsPath, shown: &str) -> Value {
    use std::os::unix::fs::PermissionsExt as _;
    let metadata = std::fs::symlink_metadata(path).unwrap();
    let (kind, target) = if metadata.is_symlink() {
        (
            "symlink",
            Some(std::fs::read_link(path).unwrap().display().to_string()),
        )
    } else if metadata.is_dir() {
        ("directory", None)
    } else {
        ("file", None)
    };
    json!({
        "name": path.file_name().unwrap().to_str().unwrap(), "path": shown, "type": kind, "size": metadata.len(),
        "mode": metadata.permissions().mode() & 0o7777, "permissions": "-rw-r--r--", "owner": "user", "group": "user",
        "modified_at": 0, "symlink_target": target
    })
}

pub(super) async fn list_files(
    State(stub): State<Stub>,
    Path(id): Path<String>,
    Json(body): Json<Value>,
) -> Answer {
    stub.known(&id)?;
    let path = body["path"].as_str().unwrap();
    if path == "/hostile" {
        let mut bad = entry(&stub.root, "/x");
        bad["name"] = json!("../escaped");
        bad["type"] = json!("file");
        let mut link = bad.clone();
        (link["name"], link["type"], link["symlink_target"]) =
            (json!("link"), json!("symlink"), json!("/etc"));
        return Ok(Json(json!({"entries": [bad, link]})).into_response());
    }
    let directory = stub.file(path, body["user"].as_str())?;
    if !directory.exists() {
        return Err(refuse(404, "not_found", &format!("{path} was not found")));
    }
    if !directory.is_dir() {
        return Err(refuse(
            400,
            "invalid_request",
            &format!("{path} is not a directory"),
        ));
    }
    let mut entries: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    entries.sort();
    let entries: Vec<_> = entries
        .iter()
        .map(|found| {
            entry(
                found,
                &format!(
                    "{}/{}",
                    path.trim_end_matches('/'),
                    found.file_name().unwrap().to_str().unwrap()
                ),
            )
        })
        .collect();
    Ok(Json(json!({"entries": entries})).into_response())
}

pub(super) async fn mkdir(
    State(stub): State<Stub>,
    Path(id): Path<String>,
    Json(body): Json<Value>,
) -> Answer {
    stub.known(&id)?;
    let path = body["path"].as_str().unwrap();
    let target = stub.file(path, body["user"].as_str())?;
    if target.exists() {
        return Err(refuse(409, "conflict", &format!("{path} exists")));
    }
    std::fs::create_dir_all(&target).unwrap();
    Ok(Json(json!({"entry": entry(&target, path)})).into_response())
}

pub(super) async fn remove(
    State(stub): State<Stub>,
    Path(id): Path<String>,
    Json(body): Json<Value>,
) -> Answer {
    stub.known(&id)?;
    let path = stub.file(body["path"].as_str().unwrap(), body["user"].as_str())?;
    let _ = if path.is_dir() {
        std::fs::remove_dir_all(path)
    } else {
        std::fs::remove_file(path)
    };
    Ok(StatusCode::NO_CONTENT.into_response())
}
