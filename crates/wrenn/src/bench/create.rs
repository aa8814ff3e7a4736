//! Sandboxes coming up, one by one and ten at once, and what they hold while they idle.

use std::time::Instant;

use anyhow::Context as _;
use futures::future::try_join_all;
use wrenn_client::{Client, Exec, SandboxHandle};

use super::floor::{BareVm, Recipe};
use super::platform::{Platform, destroy, usual_sandbox};
use super::processes::pss_mib;
use super::report::{Row, Series, Unit};

const CROWD: usize = 10;

/// The command whose output is waited for.
pub(super) fn echo() -> Exec {
    Exec {
        cmd: "sh".to_owned(),
        args: vec!["-c".to_owned(), "echo hi".to_owned()],
        ..Exec::default()
    }
}

/// One create after the other, each with its first command.
pub(super) async fn creates(
    platform: &mut Platform,
    recipe: &Recipe,
    count: usize,
    variant: &str,
) -> anyhow::Result<Vec<Row>> {
    let client = platform.client().await?;
    let mut running = Series::new(format!("create → running ({variant})"));
    let mut first = Series::new(format!("create → first exec output ({variant})"));
    let mut floor_running = Series::new("bare QEMU: restore → agent answers");
    let mut floor_first = Series::new("bare QEMU: restore → first exec output");
    for _ in 0..count {
        platform.rest().await;
        let before = Instant::now();
        let sandbox = client.sandboxes().create_running(&usual_sandbox()).await?;
        running.time(before.elapsed());
        let result = sandbox.exec(&echo()).await?;
        first.time(before.elapsed());
        anyhow::ensure!(result.stdout == "hi\n", "the first command answered {result:?}");
        sandbox.destroy_and_wait().await?;

        platform.rest().await;
        let before = Instant::now();
        let bare = recipe.start().await?;
        bare.guest.wait_healthy().await?;
        floor_running.time(before.elapsed());
        bare.end().await?;

        let before = Instant::now();
        let bare = recipe.start().await?;
        bare.guest.init().await?;
        let times = bare.guest.exec("sh", &["-c", "echo hi"]).await?;
        floor_first.time(times.first_output - before);
        bare.end().await?;
    }
    Ok(vec![
        Row::new(Unit::Millis, running, [floor_running]),
        Row::new(Unit::Millis, first, [floor_first]),
    ])
}

/// Creates sandboxes at one time.
async fn create_many(client: &Client, count: usize) -> anyhow::Result<Vec<SandboxHandle>> {
    let (sandboxes, wanted) = (client.sandboxes(), usual_sandbox());
    Ok(try_join_all((0..count).map(|_| sandboxes.create_running(&wanted))).await?)
}

/// Restores bare machines at one time.
async fn restore_many(recipe: &Recipe, count: usize) -> anyhow::Result<Vec<BareVm>> {
    try_join_all((0..count).map(|_| async {
        let bare = recipe.start().await?;
        bare.guest.wait_healthy().await?;
        Ok(bare)
    }))
    .await
}

async fn end_all(vms: Vec<BareVm>) -> anyhow::Result<()> {
    try_join_all(vms.into_iter().map(BareVm::end)).await.map(drop)
}

/// Ten creates at the same time; the time until all run, divided by ten.
pub(super) async fn crowd(
    platform: &mut Platform,
    recipe: &Recipe,
    count: usize,
) -> anyhow::Result<Vec<Row>> {
    let client = platform.client().await?;
    let each = u32::try_from(CROWD)?;
    let mut all = Series::new("10 creates at once: all running, per create");
    let mut floor = Series::new("bare QEMU: 10 restores at once, per restore");
    for _ in 0..count {
        platform.rest().await;
        let before = Instant::now();
        let sandboxes = create_many(&client, CROWD).await?;
        all.time(before.elapsed() / each);
        destroy(sandboxes).await?;

        platform.rest().await;
        let before = Instant::now();
        let bare = restore_many(recipe, CROWD).await?;
        floor.time(before.elapsed() / each);
        end_all(bare).await?;
    }
    Ok(vec![Row::new(Unit::Millis, all, [floor])])
}

/// Memory of sandboxes that have run one command and idle since.
pub(super) async fn memory(
    platform: &mut Platform,
    recipe: &Recipe,
    quick: bool,
) -> anyhow::Result<Vec<Row>> {
    let client = platform.client().await?;
    let mut rows = Vec::new();
    let mut own = Vec::new();
    for count in if quick { vec![1] } else { vec![1, 20] } {
        let mut each = Series::new(format!("memory (PSS) per idle sandbox, at {count}"));
        let mut floor = Series::new(format!("bare QEMU, at {count}"));
        let mut server = Series::new(format!("memory (PSS) of wrenn itself, at {count}"));

        let mut sandboxes = Vec::new();
        while sandboxes.len() < count {
            let wave = CROWD.min(count - sandboxes.len());
            sandboxes.extend(create_many(&client, wave).await?);
        }
        for sandbox in &sandboxes {
            sandbox.exec(&echo()).await?;
        }
        platform.rest().await;
        let vmms = platform.sandbox_vmms();
        anyhow::ensure!(
            vmms.len() == count,
            "{} machines for {count} sandboxes",
            vmms.len()
        );
        for vmm in vmms {
            each.push(pss_mib(vmm.pid).context("cannot read a machine's memory use")?);
        }
        server.push(pss_mib(platform.pid()?)?);
        destroy(sandboxes).await?;

        let mut bare = Vec::new();
        while bare.len() < count {
            let wave = CROWD.min(count - bare.len());
            bare.extend(restore_many(recipe, wave).await?);
        }
        for vm in &bare {
            vm.guest.init().await?;
            vm.guest.exec("sh", &["-c", "echo hi"]).await?;
        }
        platform.rest().await;
        for vm in &bare {
            floor.push(pss_mib(vm.pid().context("a bare machine ended")?)?);
        }
        end_all(bare).await?;
        rows.push(Row::new(Unit::Mebibytes, each, [floor]));
        own.push(Row::new(Unit::Mebibytes, server, []));
    }
    rows.extend(own);
    Ok(rows)
}
