//! The page of a daemon and the file of `postern report`, in a real browser.
//!
//! `POSTERN_PICTURES=DIR` has the pictures of the documents made anew there.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::Value;

use crate::{
    browser::Browser,
    common::{World, begin, end, fio_words, signal, until},
    lease::Server,
};

/// A volume's name that would be markup, scripts and the end of a script.
const EVIL: &str = "</script><img src onerror><b id>v&amp;";

/// A daemon that serves its page; killed when dropped.
struct Serving {
    child: Child,
    /// Where, with the host's name and port.
    address: String,
}

impl Serving {
    fn start(world: &World, socket: &Path, options: &[&str]) -> Self {
        let mut command = Command::new(world.part("posternd"));
        command.arg("--socket").arg(socket).arg("--file");
        let mut file = std::ffi::OsString::from(format!("{EVIL}="));
        file.push(world.path("v"));
        command.arg(file).args(["--no-probes", "--web", "127.0.0.1:0"]).args(options);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let shown = lines
            .find_map(|line| line.unwrap().strip_prefix("posternd: page on ").map(str::to_owned));
        Self { child, address: shown.expect("it says where the page is") }
    }

    /// The host's name and port alone.
    fn host(&self) -> &str {
        self.address.trim_start_matches("http://").trim_end_matches('/')
    }

    /// The samples of `/metrics`.
    fn metrics(&self) -> BTreeMap<String, f64> {
        let mut stream = TcpStream::connect(self.host()).unwrap();
        write!(stream, "GET /metrics HTTP/1.1\r\nHost: {}\r\n\r\n", self.host()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let samples = text.lines().filter_map(|line| line.rsplit_once(' '));
        samples.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect()
    }

    fn end(mut self) {
        signal("TERM", self.child.id());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `postern run` of a program on the volume with that name.
fn run(world: &World, socket: &Path) -> Command {
    let shown = format!("/sealed/data={EVIL}");
    let mut command = world.postern(["run", "--key-file", "v.key", "--volume", &shown]);
    command.arg("--socket").arg(socket).arg("--");
    command
}

fn surroundings() -> Option<(World, Browser, PathBuf)> {
    let world = World::new()?;
    let browser = Browser::start(&world)?;
    world.format("v", "16M");
    let socket = world.path("own.sock");
    Some((world, browser, socket))
}

/// The rows of the stages' table, by stage and operation: requests, and the sum of their times.
fn stages(browser: &mut Browser) -> BTreeMap<(String, String), (f64, f64)> {
    let rows = browser.value(
        "[...document.querySelectorAll('#stages tbody tr')].map((row) => \
         [row.dataset.stage, row.dataset.operation, Number(row.querySelector('data').value), \
         Number(row.dataset.sumNs)])",
    );
    let row = |row: &Value| {
        let text = |at: usize| row[at].as_str().unwrap().to_owned();
        ((text(0), text(1)), (row[2].as_f64().unwrap(), row[3].as_f64().unwrap()))
    };
    rows.as_array().unwrap().iter().map(row).collect()
}

/// Has the stages be those since the daemon started.
const SINCE_START: &str = "(() => { const time = document.getElementById('window'); \
    time.value = '0'; time.dispatchEvent(new Event('change')); })()";

/// Whether all that the page and the metrics both tell is the same.
fn agree(browser: &mut Browser, metrics: &BTreeMap<String, f64>) -> bool {
    let volume = format!("volume=\"{EVIL}\"");
    let rows = stages(browser);
    let counted = metrics
        .iter()
        .filter(|(name, count)| name.starts_with("postern_stage_seconds_count{") && **count > 0.0);
    let same = rows.iter().all(|((stage, operation), (count, sum_ns))| {
        let labels = format!("{{{volume},operation=\"{operation}\",stage=\"{stage}\"}}");
        let of = |what: &str| metrics.get(&format!("postern_stage_seconds_{what}{labels}"));
        of("count") == Some(count) && of("sum").is_some_and(|sum| (sum_ns / 1e9 - sum).abs() < 1e-6)
    });
    let sum = |begin: &str| -> f64 {
        let of = metrics.iter().filter(|(name, _)| name.starts_with(begin));
        of.map(|(_, value)| value).sum()
    };
    let shown = [("requests", "postern_requests_total{"), ("moved", "postern_moved_bytes_total{")];
    let totals = shown.iter().all(|(key, samples)| {
        let cell = format!("document.querySelector('#volumes td[data-key={key}] data').value");
        browser.value(&format!("Number({cell})")).as_f64() == Some(sum(samples))
    });
    rows.contains_key(&("end_to_end".to_owned(), "flush".to_owned()))
        && rows.len() == counted.count()
        && same
        && totals
}

/// The name is shown as it is and has become nothing but text.
fn expect_text_only(browser: &mut Browser) {
    let shown = browser.value("document.querySelector('#volumes tbody th').textContent");
    assert_eq!(shown, EVIL);
    assert_eq!(browser.value("document.querySelectorAll('img, b').length"), 0);
}

/// Fits its width, and can be read in both themes: WCAG 2.2, 1.4.3 and 1.4.11.
fn expect_readable(browser: &mut Browser) {
    for width in [360, 1280] {
        browser.size(width, 900);
        browser.until_true(&format!("document.documentElement.scrollWidth <= {width}"));
        browser.until_true("document.getElementById('heat').getBoundingClientRect().width > 200");
    }
    let contrast = "((name) => {
        const rgb = (name) => {
            const probe = document.createElement('i');
            probe.style.color = `var(--${name})`;
            document.body.append(probe);
            const of = getComputedStyle(probe).color.match(/[\\d.]+/g).map((n) => n / 255);
            probe.remove();
            const linear = of.map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
        };
        const [a, b] = [rgb(name), rgb('panel')].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
    })";
    let ground = "getComputedStyle(document.body).backgroundColor";
    let mut grounds = Vec::new();
    for theme in ["light", "dark"] {
        browser.theme(theme);
        for (names, least) in [
            (&["ink", "muted", "trouble"][..], 4.5),
            (&["crossing-out", "host-submit", "device", "reap", "crossing-in", "p99", "edge"], 3.0),
        ] {
            for name in names {
                let ratio = browser.value(&format!("{contrast}('{name}')")).as_f64().unwrap();
                assert!(ratio >= least, "{theme}: {name} has {ratio}");
            }
        }
        grounds.push(browser.value(ground));
    }
    assert_ne!(grounds[0], grounds[1]);
    // The page's own switch goes before the system's.
    let choose = "(() => { const theme = document.getElementById('theme'); theme.value = 'light';
        theme.dispatchEvent(new Event('change')); })()";
    browser.value(choose);
    assert_eq!(browser.value(ground), grounds[0]);
    browser.value(&choose.replace("'light'", "''"));
    assert_eq!(browser.value(ground), grounds[1]);
}

/// Goes on by the keyboard alone until what has the focus fits; every stop has a name and is seen.
#[track_caller]
fn tab_to(browser: &mut Browser, wanted: &str) {
    for _ in 0..60 {
        browser.press("Tab");
        let seen = browser.value(
            "(() => { const at = document.activeElement; return at === document.body
                || (at.matches(':focus-visible') && getComputedStyle(at).outlineStyle !== 'none'
                    && (at.textContent || at.labels?.length || at.ariaLabel) !== ''); })()",
        );
        assert_eq!(seen, true, "{}", browser.value("document.activeElement.outerHTML"));
        if browser.value(&format!("document.activeElement.matches('{wanted}')")) == true {
            return;
        }
    }
    panic!("the focus does not come to {wanted}");
}

#[test]
fn the_page_shows_what_the_daemon_counts_by_keyboard_in_both_themes_and_on_a_narrow_screen() {
    let Some((world, mut browser, socket)) = surroundings() else { return };
    let daemon = Serving::start(&world, &socket, &["--metrics", "127.0.0.1:0"]);
    browser.open(&daemon.address);
    browser.until_true("document.documentElement.dataset.state === 'empty'");
    assert_eq!(
        browser.value("document.getElementById('source').textContent.startsWith('No probes')"),
        true
    );

    let mut command = run(&world, &socket);
    command.args(fio_words("/sealed/data"));
    command.args(["--rw=randrw", "--size=8m", "--iodepth=8", "--fsync=64", "--loops=1000000"]);
    let load = begin(&mut command);
    browser.until_true("document.documentElement.dataset.state === 'live'");
    browser.until_true("document.querySelectorAll('#slow button').length > 0");
    browser.until_true("document.querySelectorAll('#bars .bar').length >= 6");
    browser.until_true(
        "Number(document.querySelector('#volumes data').value) > 0 \
         && document.querySelector('[data-tile=requests] dd').textContent !== '0'",
    );
    expect_text_only(&mut browser);
    expect_readable(&mut browser);
    if let Some(place) = std::env::var_os("POSTERN_PICTURES").map(PathBuf::from) {
        std::thread::sleep(std::time::Duration::from_secs(60));
        for theme in ["light", "dark"] {
            browser.size(1100, 860);
            browser.theme(theme);
            std::thread::sleep(std::time::Duration::from_secs(2));
            browser.picture(&place.join(format!("page-{theme}.png")));
        }
    }

    browser.value("document.activeElement.blur()");
    tab_to(&mut browser, ".skip");
    tab_to(&mut browser, "#volume");
    tab_to(&mut browser, "#pause");
    browser.press("Enter");
    browser.until_true("document.getElementById('pause').ariaPressed === 'true'");
    tab_to(&mut browser, "#heat");
    browser.press("ArrowLeft");
    browser.until_true("/p99 .*s/.test(document.getElementById('readout').textContent)");
    tab_to(&mut browser, "#slow button");
    browser.press("Enter");
    browser.until_true("document.activeElement.ariaExpanded === 'true'");
    let way = "[...document.querySelectorAll('#way .steps li')].map((step) => step.dataset.stage)";
    let stages_of_way = ["crossing_out", "host_submit", "device", "crossing_in"];
    assert_eq!(browser.value(way), serde_json::json!(stages_of_way));
    assert_eq!(browser.value("document.querySelectorAll('#way small').length"), 2, "claimed");
    browser.press("Escape");
    browser.until_true("document.getElementById('way').hidden");
    tab_to(&mut browser, "#volumes th[data-key=p99] button");
    browser.press("Enter");
    browser.until_true("document.activeElement.parentElement.ariaSort === 'descending'");
    browser.press("Enter");
    browser.until_true("document.activeElement.parentElement.ariaSort === 'ascending'");
    browser.value("document.getElementById('pause').click()");

    signal("TERM", load.pid());
    load.wait();
    browser.value(SINCE_START);
    until("page and metrics say the same", || {
        let metrics = daemon.metrics();
        agree(&mut browser, &metrics).then_some(())
    });
    let errors = "document.querySelector('#health [data-counter=errors] data').value";
    assert_eq!(browser.value(errors), "0");

    let address = daemon.address.clone();
    daemon.end();
    browser.until_true("document.documentElement.dataset.state === 'gone'");
    let elsewhere = format!(
        "performance.getEntriesByType('resource').filter((e) => !e.name.startsWith('{address}'))"
    );
    assert_eq!(browser.value(&format!("{elsewhere}.length")), 0);
    browser.expect_clean(&[&address]);
}

#[test]
fn the_page_asks_for_the_token_and_shows_nothing_without_it() {
    let Some((world, mut browser, socket)) = surroundings() else { return };
    std::fs::write(world.path("token"), "0123456789abcdef\n").unwrap();
    let token = world.path("token");
    let daemon = Serving::start(&world, &socket, &["--web-token-file", token.to_str().unwrap()]);
    browser.open(&daemon.address);
    let state = |name: &str| format!("document.documentElement.dataset.state === '{name}'");
    browser.until_true(&state("token"));
    assert_eq!(browser.value("document.getElementById('tiles').children.length"), 0);
    for (tried, then) in [("0123456789abcdeX", "token"), ("0123456789abcdef", "empty")] {
        browser.value("document.getElementById('token').focus()");
        browser.ask("Input.insertText", serde_json::json!({ "text": tried }));
        browser.press("Enter");
        browser.until_true("document.getElementById('token').value === ''");
        browser.until_true(&state(then));
    }
    browser.expect_clean(&[&daemon.address]);
    daemon.end();
}

#[test]
fn a_report_is_a_file_that_shows_the_same_without_a_daemon() {
    let Some((world, mut browser, socket)) = surroundings() else { return };
    let Some(program) = world.guest("serve") else { return };
    let daemon = Serving::start(&world, &socket, &[]);
    let mut command = run(&world, &socket);
    let (mut server, first) = Server::start(command.arg(&program).args(["/sealed/data", "rw"]));
    assert_eq!(first, "ready");
    let report = |file: &str, duration: &str| {
        let mut command = world.postern(["report", "--duration", duration, "--output", file]);
        command.arg("--socket").arg(&socket);
        command
    };
    let mut block = 0;
    until("a report has single requests in it", || {
        let mut written = begin(&mut report("busy.html", "1s"));
        while written.is_running() {
            server.expect(&format!("w {} 7", block % 512), "ok");
            server.expect("s", "ok");
            block += 1;
        }
        written.wait().expect(0);
        let text = std::fs::read_to_string(world.path("busy.html")).unwrap();
        text.contains("\"request\":\"").then_some(())
    });
    server.end();
    let stats = || {
        let stats = end(world.postern(["stats", "--json", "--socket"]).arg(&socket)).expect(0);
        let stats: Value = serde_json::from_str(&stats.stdout).unwrap();
        stats["daemon_stages"].clone()
    };
    let stats = until("nothing more is counted", || {
        let before = stats();
        end(&mut report("quiet.html", "1s")).expect(0);
        (before == stats()).then_some(before)
    });
    daemon.end();

    let address = |file: &str| format!("file://{}", world.path(file).display());
    browser.open(&address("busy.html"));
    browser.until_true("document.documentElement.dataset.state === 'report'");
    expect_text_only(&mut browser);
    expect_readable(&mut browser);
    assert_eq!(browser.value("document.querySelectorAll('#slow button').length > 0"), true);
    assert_eq!(browser.value("document.querySelectorAll('#bars .bar').length > 0"), true);

    browser.open(&address("quiet.html"));
    browser.until_true("document.documentElement.dataset.state === 'report'");
    browser.value(SINCE_START);
    let shown = stages(&mut browser);
    let counted = stats.as_array().unwrap();
    assert!(!counted.is_empty());
    assert_eq!(shown.len(), counted.len());
    for row in counted {
        let name = |what: &str| row[what].as_str().unwrap().to_owned();
        let (count, sum_ns) = shown[&(name("stage"), name("operation"))];
        assert_eq!((row["count"].as_f64(), row["sum_ns"].as_f64()), (Some(count), Some(sum_ns)));
    }
    browser.expect_clean(&[&address("busy.html"), &address("quiet.html")]);
}
