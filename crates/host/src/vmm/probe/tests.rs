use super::*;
use std::os::unix::fs::PermissionsExt as _;

fn shell(script: &str) -> Outcome {
    run_child(Command::new("sh").args(["-c", script]))
}

fn line(event: &Event) -> Vec<u8> {
    let mut line = Vec::new();
    tell(&mut line, event).unwrap();
    line
}

fn lines(events: &[Event]) -> Vec<u8> {
    events.iter().flat_map(line).collect()
}

#[test]
fn a_guest_within_its_budget_means_hardware() {
    let output = lines(&[
        Event::Started,
        Event::Loop {
            rounds: ROUNDS,
            millis: 0.9,
        },
        Event::Finished { millis: 0.1 },
    ]);
    let Outcome { report, lasting } = judge(&output, Duration::from_millis(8));
    assert!(lasting);
    assert_eq!(report.verdict, Accelerator::Kvm);
    assert!(report.detail.contains("1.0 ms"), "{}", report.detail);
}

#[test]
fn slow_failed_stuck_and_garbled_guests_mean_emulation() {
    let took = Duration::from_millis(401);
    let cases: &[(Vec<u8>, &str, bool)] = &[
        (
            lines(&[
                Event::Started,
                Event::Loop {
                    rounds: ROUNDS,
                    millis: 61.0,
                },
                Event::Finished { millis: 0.0 },
            ]),
            "61.0 ms",
            true,
        ),
        // The stages must both be there: an end without a loop proves nothing.
        (
            lines(&[Event::Started, Event::Finished { millis: 0.1 }]),
            "too slow",
            true,
        ),
        (
            lines(&[Event::Started, Event::Finished { millis: -5.0 }]),
            "too slow",
            true,
        ),
        (
            lines(&[
                Event::Started,
                Event::Loop {
                    rounds: FIRST_ROUNDS,
                    millis: 0.1,
                },
                Event::Finished { millis: 0.1 },
            ]),
            "too slow",
            true,
        ),
        (
            lines(&[
                Event::Started,
                Event::Failed {
                    reason: "x\u{1b}y".to_owned(),
                },
            ]),
            "unusable: xy",
            true,
        ),
        (lines(&[Event::Started]), "401 ms", true),
        (
            lines(&[
                Event::Started,
                Event::Loop {
                    rounds: ROUNDS,
                    millis: 99.5,
                },
            ]),
            "99.5 ms",
            true,
        ),
        (b"\xff\xfe{\n{}\n[1,2]\n".to_vec(), "no answer", false),
        (Vec::new(), "no answer", false),
    ];
    for (output, part, expected) in cases {
        let Outcome { report, lasting } = judge(output, took);
        assert_eq!(report.verdict, Accelerator::Tcg, "{report:?}");
        assert!(report.detail.contains(part), "{} lacks {part}", report.detail);
        assert_eq!(lasting, *expected, "{report:?}");
        assert!(report.millis.is_some());
    }
}

#[test]
fn half_a_line_is_not_an_event_yet() {
    let whole = line(&Event::Started);
    for cut in 0..whole.len() {
        assert_eq!(events(&whole[..cut]), []);
    }
    assert_eq!(events(&whole), [Event::Started]);
}

#[test]
fn a_missing_or_closed_device_is_told_with_its_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let report = without_a_guest(&dir.path().join("kvm")).unwrap();
    assert_eq!((report.verdict, report.millis), (Accelerator::Tcg, None));
    assert!(report.remedy.unwrap().contains("firmware"));

    let closed = dir.path().join("closed");
    std::fs::write(&closed, "").unwrap();
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o000)).unwrap();
    match without_a_guest(&closed) {
        Some(report) => assert!(report.remedy.unwrap().contains("usermod -aG kvm")),
        // Root may open everything.
        None => assert!(rustix::process::geteuid().is_root()),
    }
}

/// Whatever the child does, the answer comes in time and nothing of it stays.
#[test]
fn a_child_that_hangs_floods_or_dies_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let started = r#"echo '{"event":"started"}'"#;
    let hang = format!("echo $$ > {}; {started}; exec sleep 1000", pid_file.display());
    let begun = Instant::now();
    let hung = shell(&hang);
    let took = begun.elapsed();
    assert!(took >= PATIENCE && took < Duration::from_secs(5), "{took:?}");
    assert!(
        hung.lasting && hung.report.detail.contains("not done"),
        "{}",
        hung.report.detail
    );
    let pid = std::fs::read_to_string(&pid_file).unwrap();
    let gone = Instant::now() + Duration::from_secs(10);
    while Path::new("/proc").join(pid.trim()).exists() {
        assert!(Instant::now() < gone, "the child {} is still there", pid.trim());
        std::thread::yield_now();
    }

    assert_eq!(shell("exec yes").report.verdict, Accelerator::Tcg);
    assert!(!shell("exit 3").lasting);
    let missing = run_child(&mut Command::new(dir.path().join("missing")));
    assert!(!missing.lasting && missing.report.detail.contains("cannot be started"));
}

/// An answer is taken when it is there; the child need not have ended.
#[test]
fn the_last_event_ends_the_wait() {
    let script = r#"echo '{"event":"started"}'; echo '{"event":"loop","rounds":1000000,"millis":1.5}'
        echo '{"event":"finished","millis":0.5}'; exec sleep 1000"#;
    let outcome = shell(script);
    assert_eq!(outcome.report.verdict, Accelerator::Kvm);
    assert_eq!(outcome.report.millis, Some(2.0));
}
