use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use wrenn_host::meminfo_mb;
use wrenn_host::vmm::ProbeReport;

use super::checks::*;
use super::machine::*;
use super::*;

fn report(verdict: Accelerator) -> ProbeReport {
    ProbeReport {
        verdict,
        detail: "the guest took 7 ms".to_owned(),
        millis: Some(7.0),
        remedy: None,
    }
}

#[test]
fn what_was_asked_for_holds_but_not_against_the_machine() {
    use Accelerator::{Kvm, Tcg};
    for (found, wanted, chosen, status, blocking) in [
        (Kvm, None, Kvm, Status::Ok, false),
        (Tcg, None, Tcg, Status::Warn, false),
        (Kvm, Some(Kvm), Kvm, Status::Ok, false),
        (Tcg, Some(Kvm), Kvm, Status::Fail, true),
        (Kvm, Some(Tcg), Tcg, Status::Warn, false),
        (Tcg, Some(Tcg), Tcg, Status::Warn, false),
    ] {
        let (check, accelerator) = accelerator(report(found), wanted);
        assert_eq!(
            (accelerator, check.status, check.blocking),
            (chosen, status, blocking),
            "{check:?}"
        );
        assert!(check.value.contains("7 ms"), "{check:?}");
    }
}

#[test]
fn space_is_judged_by_what_is_still_to_be_made() {
    assert!(judge_disk(1023, true).blocking);
    assert!(!judge_disk(1024, true).blocking);
    assert!(judge_disk(3071, false).blocking);
    assert_eq!(judge_disk(3072, false).status, Status::Warn);
    assert_eq!(judge_disk(10 * 1024, false).status, Status::Ok);
}

#[test]
fn missing_tools_block_only_while_something_needs_them() {
    let nothing = Made::default();
    let built = Made {
        kernel: None,
        rootfs: true,
        template: true,
    };
    let without = |missing: &'static str| {
        move |name: &str| match name == missing {
            true => Program::Missing,
            false => Program::Found,
        }
    };
    let check = |made: &Made, root, missing| judge_tools(made, root, without(missing)).remove(0);
    assert_eq!(check(&nothing, false, "").status, Status::Ok);
    let missing = check(&nothing, true, "mmdebstrap");
    assert!(missing.blocking && missing.remedy.unwrap().contains("apt-get install mmdebstrap"));
    let later = check(&built, true, "mmdebstrap");
    assert_eq!((later.status, later.blocking), (Status::Warn, false));
    assert!(
        check(&built, true, "prlimit").blocking,
        "every VM starts through it"
    );
    assert!(check(&nothing, false, "newuidmap").blocking);
    assert_eq!(check(&nothing, true, "newuidmap").status, Status::Ok);
    let hidden = judge_tools(&nothing, true, |name| match name {
        "mke2fs" => Program::OutsidePath("/usr/sbin".into()),
        _ => Program::Found,
    });
    assert!(
        hidden[0].remedy.as_ref().unwrap().contains(":/usr/sbin\""),
        "{hidden:?}"
    );
}

#[test]
fn ordinary_users_need_namespaces_and_ids() {
    let fine = Host {
        subordinate_ids: true,
        max_user_namespaces: Some(100),
        ..Host::default()
    };
    let made = Made::default();
    assert_eq!(user_namespaces(&fine, &made)[0].status, Status::Ok);
    assert_eq!(
        user_namespaces(
            &Host {
                root: true,
                ..Host::default()
            },
            &made
        ),
        []
    );
    for host in [
        Host {
            max_user_namespaces: Some(0),
            ..fine.clone()
        },
        Host {
            unprivileged_userns: Some(0),
            ..fine.clone()
        },
        Host {
            subordinate_ids: false,
            ..fine.clone()
        },
    ] {
        assert!(user_namespaces(&host, &made)[0].blocking, "{host:?}");
        assert!(
            !user_namespaces(
                &host,
                &Made {
                    rootfs: true,
                    ..Made::default()
                }
            )[0]
            .blocking
        );
    }
    assert_eq!(
        user_namespaces(
            &Host {
                restricted_userns: Some(1),
                ..fine
            },
            &made
        )[0]
        .status,
        Status::Warn
    );
}

#[test]
fn files_of_the_system_are_read_as_they_are_written() {
    let passwd = "root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n";
    assert_eq!(user_name(passwd, 1000).as_deref(), Some("ann"));
    assert_eq!(user_name(passwd, 7), None);
    assert!(has_range("bob:1:9\nann:100000:65536\n", Some("ann"), 1000));
    assert!(has_range("1000:100000:65536\n", Some("ann"), 1000));
    assert!(!has_range("ann:100000:1000\n", Some("ann"), 1000));
    assert!(!has_range("garbage\n::\n", None, 1000));
    let meminfo = "MemTotal:       24000000 kB\nMemAvailable:    2048000 kB\n";
    assert_eq!(meminfo_mb(meminfo, "MemAvailable"), Some(2000));
    assert_eq!(meminfo_mb("MemAvailable: many", "MemAvailable"), None);
    assert_eq!(
        memory("MemTotal: 2048000 kB\nMemAvailable: 1024000 kB")[0].status,
        Status::Warn
    );
}

#[test]
fn a_clock_before_the_program_was_made_is_wrong() {
    let now = SystemTime::now();
    assert_eq!(
        judge_clock(now, Some(now - Duration::from_secs(60)), true).status,
        Status::Ok
    );
    assert_eq!(judge_clock(now, None, false).status, Status::Ok);
    assert_eq!(
        judge_clock(now, Some(now + Duration::from_secs(100_000)), true).status,
        Status::Fail
    );
}

#[test]
fn what_is_made_is_found_and_what_is_half_made_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut input = input(dir.path());
    assert_eq!(Made::look(&input), Made::default());
    for version in ["6.1.0-9-cloud-amd64", "6.1.0-44-cloud-amd64"] {
        let kernel = input.cache_dir.join("kernel").join(version);
        std::fs::create_dir_all(&kernel).unwrap();
        std::fs::write(kernel.join("vmlinux"), "").unwrap();
    }
    std::fs::create_dir_all(input.cache_dir.join("kernel/6.9.0-no-image")).unwrap();
    std::fs::create_dir_all(input.cache_dir.join("rootfs/.work-1")).unwrap();
    let zero = "00000000-0000-0000-0000-000000000000";
    let image = input
        .data_dir
        .join(format!("images/teams/{zero}/{zero}/1x512-abc"));
    std::fs::create_dir_all(&image).unwrap();
    let made = Made::look(&input);
    assert_eq!(
        made,
        Made {
            kernel: Some("6.1.0-44-cloud-amd64".to_owned()),
            rootfs: false,
            template: false
        }
    );
    std::fs::write(image.join("manifest.json"), "{}").unwrap();
    std::fs::write(input.cache_dir.join("rootfs/abc.ext4"), "").unwrap();
    assert!(Made::look(&input).template && Made::look(&input).rootfs);
    input.data_dir = dir.path().join("elsewhere");
    assert!(!Made::look(&input).template);
}

fn input(dir: &Path) -> DoctorInput {
    DoctorInput {
        data_dir: dir.join("data"),
        cache_dir: dir.join("cache"),
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        accelerator: Some(Accelerator::Tcg),
        guest_ca_bundle: None,
        starting: false,
        fresh_probe: false,
    }
}

/// A server that answers every connection with `answer`, for as long as the address is used.
fn server(answer: &'static [u8], connections: usize) -> (SocketAddr, std::thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serving = std::thread::spawn(move || {
        for stream in listener.incoming().take(connections) {
            let mut stream = stream.unwrap();
            let mut request = [0; 1024];
            assert!(stream.read(&mut request).unwrap() > 0);
            stream.write_all(answer).unwrap();
        }
    });
    (address, serving)
}

#[test]
fn a_used_port_is_told_from_our_own() {
    let health = b"HTTP/1.1 200 OK\r\ncontent-length: 33\r\n\r\n{\"status\":\"ok\",\"version\":\"0.1.0\"}";
    let (address, serving) = server(health, 2);
    assert_eq!(port(address, false).status, Status::Ok);
    let starting = port(address, true);
    assert!(
        starting.blocking && starting.value.contains("already"),
        "{starting:?}"
    );
    serving.join().unwrap();

    let (address, serving) = server(b"220 mail.example ESMTP\r\n", 1);
    let foreign = port(address, false);
    assert!(
        foreign.blocking && foreign.value.contains("another program"),
        "{foreign:?}"
    );
    serving.join().unwrap();
    assert!(!says_health(b"HTTP/1.1 200 OK\r\n\r\n}{"));

    // One that takes the connection and says nothing does not hold us up.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let begun = Instant::now();
    assert!(port(silent.local_addr().unwrap(), false).blocking);
    assert!(begun.elapsed() < Duration::from_secs(5));
    let free = silent.local_addr().unwrap();
    drop(silent);
    assert_eq!(port(free, true).status, Status::Ok);
}

#[test]
fn a_bundle_that_was_named_must_hold_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bundle.pem");
    assert!(authorities(Some(&path))[0].blocking);
    std::fs::write(&path, "nothing\n").unwrap();
    assert!(authorities(Some(&path))[0].blocking);
    std::fs::write(&path, "-----BEGIN CERTIFICATE-----\n").unwrap();
    assert!(!authorities(Some(&path))[0].blocking);
}

#[test]
fn a_data_directory_that_is_a_file_blocks() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(data_dir(&dir.path().join("a/b"))[0].status, Status::Ok);
    std::fs::write(dir.path().join("a"), "").unwrap();
    assert!(data_dir(&dir.path().join("a/b"))[0].blocking);
}

#[test]
fn the_report_shows_remedies_and_drives_no_terminal() {
    let checks = [
        Check::ok("one", "fine\u{1b}[2J"),
        Check::blocking("second", "gone", "get it back"),
    ];
    let text = table(&checks, false);
    assert!(!text.contains('\u{1b}'), "{text}");
    assert!(
        text.contains("ok    one     fine[2J\n") && text.contains("FAIL  second  gone\n"),
        "{text}"
    );
    assert!(
        text.contains("→ get it back") && text.contains("cannot work until 1 failure is mended"),
        "{text}"
    );
    assert!(table(&checks, true).contains("\u{1b}[31mFAIL"));
    assert!(table(&checks[..1], false).ends_with("All is well.\n"));
}
