//! What catching calls costs: nanoseconds of single calls, natively and inside, side by side.
//!
//! `cargo build --release --workspace && cargo bench -p postern-preload --bench calls`. Needs a C
//! compiler and a target directory on a file system with O_DIRECT.

use std::{
    fs,
    path::Path,
    process::{Command, ExitCode},
};

fn output(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{command:?}: {}{}", output.status, String::from_utf8_lossy(&output.stderr)))
}

fn bench() -> Result<(), String> {
    let this = std::env::current_exe().map_err(|error| error.to_string())?;
    let built = this.ancestors().nth(2).ok_or("no target directory")?;
    let postern = built.join("postern");
    if !postern.exists() {
        return Err("postern is not built: cargo build --release --workspace".into());
    }
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("calls");
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).map_err(|error| error.to_string())?;
    let at = |name: &str| directory.join(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/calls.c");
    let program = at("calls");
    output(Command::new("cc").args(["-w", "-O2", "-o"]).arg(&program).arg(source))?;
    for file in ["ordinary", "plain"] {
        fs::write(at(file), b"content").map_err(|error| error.to_string())?;
    }
    output(Command::new(&postern).arg("format").arg(at("volume")).args(["--size", "16M"]))?;
    let natively = output(Command::new(&program).args([at("ordinary"), at("plain")]))?;
    let mapping = format!("{}={}", at("vault").display(), at("volume").display());
    let inside = output(
        Command::new(&postern).args(["run", "--no-probes", "--volume", &mapping, "--"]).args([
            &program,
            &at("ordinary"),
            &at("vault"),
        ]),
    )?;
    println!("| call | native, ns | inside, ns |\n|---|---|---|");
    for (there, here) in natively.lines().zip(inside.lines()) {
        let (name, there) = there.split_once('\t').unwrap_or((there, ""));
        println!("| {name} | {there} | {} |", here.split_once('\t').map_or("", |(_, ns)| ns));
    }
    Ok(())
}

fn main() -> ExitCode {
    // `cargo test --benches` starts it too: only a look whether it starts.
    if std::env::args().any(|argument| argument == "--test") || cfg!(debug_assertions) {
        return ExitCode::SUCCESS;
    }
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("calls: {why}");
            ExitCode::FAILURE
        }
    }
}
