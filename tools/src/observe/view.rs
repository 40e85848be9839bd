//! What `postern top` shows: state that keys change, and how it is drawn.
//!
//! Holds: it draws into any terminal, however small; what has no room is left out, the volumes last.

use ratatui::{
    Frame,
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Cell, Row, Table},
};

use super::{
    heat::{Heat, label},
    printable,
    sample::{Interval, VolumeRow, WHOLE},
};
use crate::stats::micros;

/// Width of the heatmap's labels.
const LABELS: u16 = 8;
/// Shades of the heatmap, from few to many.
const SHADES: [char; 4] = ['░', '▒', '▓', '█'];
const KEYS: &str =
    "q quit  s sort  r reverse  / filter  up/down volume  Esc all  Tab sessions  p pause";

/// Damage found; the asterisk: as its enclaves claim.
const CLAIMED: (&str, u16) = ("damaged*", 8);

/// What the volumes are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// Requests a second.
    #[default]
    Rate,
    /// Bytes a second.
    Throughput,
    /// The 99th percentile.
    Latency,
    /// Errors.
    Errors,
    /// Their names.
    Name,
}

impl Sort {
    const fn next(self) -> Self {
        match self {
            Self::Rate => Self::Throughput,
            Self::Throughput => Self::Latency,
            Self::Latency => Self::Errors,
            Self::Errors => Self::Name,
            Self::Name => Self::Rate,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Rate => "IOPS",
            Self::Throughput => "MB/s",
            Self::Latency => "p99",
            Self::Errors => "errors",
            Self::Name => "name",
        }
    }
}

/// What is shown.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// The last interval.
    pub interval: Interval,
    /// Latency over time.
    pub heat: Heat,
    /// Nothing new is shown.
    pub paused: bool,
    sort: Sort,
    reversed: bool,
    filter: String,
    typing: bool,
    selected: Option<u64>,
    sessions: bool,
}

impl View {
    /// Shows a new interval, unless it is paused.
    pub fn show(&mut self, interval: Interval) {
        if !self.paused {
            self.heat.push(&interval.merged(None, WHOLE, None));
            self.interval = interval;
        }
    }

    /// Does what a key says; answers whether to go on.
    pub fn press(&mut self, key: KeyEvent) -> bool {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if control => return false,
            KeyCode::Enter | KeyCode::Esc if self.typing => {
                self.typing = false;
                if key.code == KeyCode::Esc {
                    self.filter.clear();
                }
            }
            KeyCode::Backspace if self.typing => {
                self.filter.pop();
            }
            KeyCode::Char(c) if self.typing => self.filter.push(c),
            KeyCode::Char('q') => return false,
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('r') => self.reversed = !self.reversed,
            KeyCode::Char('p') => self.paused = !self.paused,
            KeyCode::Char('/') => self.typing = true,
            KeyCode::Tab => self.sessions = !self.sessions,
            KeyCode::Esc => self.selected = None,
            KeyCode::Down => self.select(1),
            KeyCode::Up => self.select(-1),
            _ => {}
        }
        true
    }

    fn select(&mut self, by: isize) {
        let rows: Vec<u64> = self.rows().iter().map(|row| row.volume).collect();
        let at = self.selected.and_then(|volume| rows.iter().position(|row| *row == volume));
        let next = match at {
            Some(at) => at.saturating_add_signed(by).min(rows.len().saturating_sub(1)),
            None => 0,
        };
        self.selected = rows.get(next).copied();
    }

    /// The volumes that the filter lets pass, in their order.
    pub fn rows(&self) -> Vec<&VolumeRow> {
        let passes = |row: &&VolumeRow| row.name.contains(&self.filter);
        let mut rows: Vec<_> = self.interval.volumes.iter().filter(passes).collect();
        rows.sort_by(|a, b| {
            let order = match self.sort {
                Sort::Rate => b.rate().total_cmp(&a.rate()),
                Sort::Throughput => b.throughput().total_cmp(&a.throughput()),
                Sort::Latency => b.p99_ns.cmp(&a.p99_ns),
                Sort::Errors => b.errors.cmp(&a.errors),
                Sort::Name => a.name.cmp(&b.name),
            };
            if self.reversed { order.reverse() } else { order }
        });
        rows
    }

    /// Draws it.
    pub fn draw(&self, frame: &mut Frame<'_>) {
        let area = frame.area();
        let stages = self.interval.stages(self.selected);
        let wanted = stages.len() as u16 + 1;
        let (stage_lines, heat_lines) = match area.height {
            0..12 => (0, 0),
            12..20 => (wanted.min(area.height - 7), 0),
            _ => (wanted.min(area.height / 2 - 2), area.height / 3),
        };
        let [head, volumes, middle, heat, foot] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Min(2),
            Constraint::Length(stage_lines),
            Constraint::Length(heat_lines),
            Constraint::Length(u16::from(area.height > 4)),
        ])
        .areas(area);
        frame.render_widget(self.head(), head);
        if self.sessions {
            frame.render_widget(self.session_table(), volumes);
        } else {
            frame.render_widget(self.volume_table(volumes), volumes);
        }
        if stage_lines > 0 {
            frame.render_widget(stage_table(&stages), middle);
        }
        self.draw_heat(frame, heat);
        frame.render_widget(self.foot(), foot);
    }

    fn head(&self) -> Line<'_> {
        let rows = &self.interval.volumes;
        let rate: f64 = rows.iter().map(VolumeRow::rate).sum();
        let throughput: f64 = rows.iter().map(VolumeRow::throughput).sum();
        let in_flight: u64 = rows.iter().map(|row| row.in_flight).sum();
        let text = format!(
            "postern top  {rate:.0} IOPS  {:.1} MB/s  {in_flight} under way  {} sessions  \
             times by the daemon's clock{}",
            throughput / 1e6,
            self.interval.sessions.len(),
            if self.paused { "  PAUSED" } else { "" },
        );
        Line::styled(text, Style::new().add_modifier(Modifier::BOLD))
    }

    fn foot(&self) -> Line<'_> {
        if self.typing || !self.filter.is_empty() {
            return Line::raw(format!("filter: {}", printable(&self.filter)));
        }
        Line::styled(KEYS, Style::new().add_modifier(Modifier::DIM))
    }

    fn volume_table(&self, area: Rect) -> Table<'_> {
        let narrow = area.width < 72;
        let heading = |name: &'static str| {
            let mark =
                if name == self.sort.name() { Modifier::REVERSED } else { Modifier::empty() };
            Cell::from(name).style(Style::new().add_modifier(mark))
        };
        let all: &[(&str, u16)] = if narrow {
            &[("IOPS", 8), ("MB/s", 8), ("p99", 10)]
        } else {
            &[
                ("IOPS", 9),
                ("read", 8),
                ("write", 8),
                ("MB/s", 8),
                ("busy", 5),
                ("p50", 10),
                ("p99", 10),
                ("errors", 7),
                CLAIMED,
            ]
        };
        // What enclaves claim comes last, where there is room.
        let columns =
            if area.width < 92 { all.strip_suffix(&[CLAIMED]).unwrap_or(all) } else { all };
        let rows = self.rows().into_iter().map(|row| {
            let rate = |of: &str| row.per_second.get(of).copied().unwrap_or(0.0);
            let cell = |name: &str| match name {
                "IOPS" => format!("{:.0}", row.rate()),
                "MB/s" => format!("{:.1}", row.throughput() / 1e6),
                "busy" => row.in_flight.to_string(),
                "p50" => micros(row.p50_ns),
                "p99" => micros(row.p99_ns),
                "errors" => row.errors.to_string(),
                "damaged*" => row.claim("integrity_failures").to_string(),
                operation => format!("{:.0}", rate(operation)),
            };
            let cells = columns.iter().map(|&(name, _)| Cell::from(cell(name)));
            let name = Cell::from(printable(&row.name));
            let chosen = self.selected == Some(row.volume);
            let style = if chosen { Modifier::REVERSED } else { Modifier::empty() };
            Row::new(std::iter::once(name).chain(cells)).style(Style::new().add_modifier(style))
        });
        let widths = columns.iter().map(|(_, width)| Constraint::Length(*width));
        let first = Cell::from(if self.sort == Sort::Name { "VOLUME (us)" } else { "volume (us)" });
        let names = columns.iter().map(|&(name, _)| heading(name));
        Table::new(rows, std::iter::once(Constraint::Min(8)).chain(widths))
            .header(Row::new(std::iter::once(first).chain(names)))
    }

    fn session_table(&self) -> Table<'_> {
        let rows = self.interval.sessions.iter().map(|(session, rate)| {
            Row::new([
                session.session.to_string(),
                session.process.to_string(),
                session.lanes.to_string(),
                session.files.to_string(),
                session.in_flight.to_string(),
                format!("{rate:.0}"),
                session.requests.to_string(),
            ])
        });
        let names = ["session", "process", "lanes", "files", "busy", "IOPS", "requests"];
        Table::new(rows, [Constraint::Fill(1); 7]).header(Row::new(names))
    }

    /// Time goes to the right, slow is up.
    fn draw_heat(&self, frame: &mut Frame<'_>, area: Rect) {
        if area.height < 3 || area.width <= LABELS {
            return;
        }
        let width = usize::from(area.width - LABELS);
        let Some((first, last, most)) = self.heat.extent(width) else { return };
        let lines = usize::from(area.height) - 1;
        // What is slower than there is room for is shown in the topmost row.
        let top = last.min(first + lines - 1);
        let title = Line::raw("latency, whole way of all requests");
        frame.render_widget(title, Rect { height: 1, ..area });
        for (line, row) in (first..=top).rev().enumerate() {
            let mut text = format!("{:>7} ", label(if row == top { last } else { row }));
            for column in self.heat.last(width) {
                let to = if row == top { last } else { row };
                text.push(shade(column[row..=to].iter().sum(), most));
            }
            let place = Rect { y: area.y + 1 + line as u16, height: 1, ..area };
            let hot = Style::new().fg(Color::Yellow);
            frame.render_widget(Line::from(Span::styled(text, hot)), place);
        }
    }
}

/// The shade of a count: each is four times the one before.
fn shade(count: u64, most: u64) -> char {
    match count {
        0 => ' ',
        _ if count.saturating_mul(64) < most => SHADES[0],
        _ if count.saturating_mul(16) < most => SHADES[1],
        _ if count.saturating_mul(4) < most => SHADES[2],
        _ => SHADES[3],
    }
}

fn stage_table(stages: &[super::sample::StageRow]) -> Table<'_> {
    let rows = stages.iter().map(|row| {
        Row::new([
            row.stage.clone(),
            row.operation.clone(),
            row.count.to_string(),
            micros(row.p50_ns),
            micros(row.p99_ns),
            micros(row.p999_ns),
        ])
    });
    let widths = [14, 8, 10, 10, 10, 10].map(Constraint::Length);
    let names = ["stage", "op", "count", "p50 us", "p99 us", "p99.9 us"];
    let style = Style::new().add_modifier(Modifier::UNDERLINED);
    Table::new(rows, widths).header(Row::new(names).style(style))
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};

    use super::*;
    use crate::observe::sample::tests::recorded;

    fn view() -> View {
        let mut view = View::default();
        for n in 1..6 {
            let before = recorded(n * 1_000_000_000, n * 10_000);
            let after = recorded((n + 1) * 1_000_000_000, (n + 1) * 10_000);
            view.show(Interval::between(&before, &after));
        }
        view
    }

    fn screen(view: &View, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..height).map(|y| line(y).trim_end().to_owned()).collect()
    }

    fn line_of(screen: &[String], begin: &str) -> String {
        screen.iter().find(|line| line.starts_with(begin)).cloned().unwrap_or_default()
    }

    fn press(view: &mut View, codes: &[KeyCode]) -> bool {
        codes.iter().all(|code| view.press(KeyEvent::from(*code)))
    }

    #[test]
    fn a_large_terminal_shows_volumes_stages_and_the_heatmap() {
        let screen = screen(&view(), 100, 30);
        assert!(screen[0].contains("15150 IOPS") && screen[0].contains("61.4 MB/s"), "{screen:#?}");
        let fast: Vec<String> =
            line_of(&screen, "fast").split_whitespace().map(str::to_owned).collect();
        assert_eq!(fast, ["fast", "10100", "10100", "0", "41.0", "1", "20.0", "160.0", "100", "2"]);
        let device = line_of(&screen, "device");
        assert_eq!(device.split_whitespace().nth(2), Some("15000"), "{device}");
        assert!(screen.iter().any(|line| line.contains("32 us") && line.contains('█')));
        assert!(line_of(&screen, "q quit").contains("s sort"));
    }

    #[test]
    fn it_draws_into_any_terminal_and_shows_the_volumes_as_long_as_there_is_room() {
        for width in [1, 2, 7, 9, 20, 40, 80, 300] {
            for height in [1, 2, 3, 5, 11, 12, 13, 19, 20, 24, 100] {
                let mut view = view();
                screen(&view, width, height);
                press(&mut view, &[KeyCode::Tab]);
                screen(&view, width, height);
                screen(&View::default(), width, height);
            }
        }
        let small = screen(&view(), 40, 8);
        let fast: Vec<String> =
            line_of(&small, "fast").split_whitespace().map(str::to_owned).collect();
        assert_eq!(fast, ["fast", "10100", "41.0", "160.0"], "{small:#?}");
    }

    #[test]
    fn keys_sort_filter_select_and_end() {
        let mut view = view();
        let names = |view: &View| {
            view.rows().iter().map(|row| row.name.clone()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(names(&view), "fast slow");
        press(&mut view, &[KeyCode::Char('s'), KeyCode::Char('s')]);
        assert_eq!(names(&view), "slow fast", "by p99");
        press(&mut view, &[KeyCode::Char('r')]);
        assert_eq!(names(&view), "fast slow");
        assert!(press(&mut view, &[KeyCode::Char('/'), KeyCode::Char('q'), KeyCode::Backspace]));
        press(&mut view, &[KeyCode::Char('o'), KeyCode::Enter]);
        assert_eq!(names(&view), "slow");
        press(&mut view, &[KeyCode::Down]);
        assert_eq!(view.selected, Some(2));
        let shown = screen(&view, 100, 30);
        assert_eq!(line_of(&shown, "device").split_whitespace().nth(2), Some("5000"));
        press(&mut view, &[KeyCode::Char('/'), KeyCode::Esc, KeyCode::Esc]);
        assert_eq!((names(&view).as_str(), view.selected), ("fast slow", None));
        press(&mut view, &[KeyCode::Tab]);
        assert!(line_of(&screen(&view, 100, 30), "7").contains("4711"));
        press(&mut view, &[KeyCode::Char('p')]);
        view.show(Interval::default());
        assert!(!view.interval.volumes.is_empty(), "paused");
        assert!(!press(&mut view, &[KeyCode::Char('q')]));
        let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert!(!view.press(interrupt));
    }
}
