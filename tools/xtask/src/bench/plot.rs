//! The ratios as a picture: a group of bars for each case, a bar for each target, whiskers from
//! quartile to quartile.

use std::collections::BTreeSet;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::{Measured, Target, numbers::Spread};

/// Pixels of a bar with its gap.
const BAR: u32 = 16;

/// An SVG of the ratios to the target `first`.
///
/// # Errors
/// If it cannot be drawn.
pub fn ratios(measured: &[Measured], first: Target) -> Result<String> {
    let mut text = String::new();
    draw(measured, first, &mut text).map_err(|error| anyhow!("cannot draw: {error}"))?;
    Ok(text)
}

fn draw(
    measured: &[Measured],
    first: Target,
    into: &mut String,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let targets: BTreeSet<Target> = measured
        .iter()
        .flat_map(|case| case.runs.iter().skip(1).map(|(target, _)| *target))
        .collect();
    let group = targets.len() + 1;
    let columns = measured.len() * group;
    // What a target cannot do has no bar.
    let of = |target: Target| {
        measured.iter().enumerate().filter_map(move |(case, measured)| {
            let at = measured.runs.iter().position(|(other, _)| *other == target)?;
            Some((case, Spread::of(measured.ratios(at))))
        })
    };
    let highest = targets
        .iter()
        .flat_map(|target| of(*target))
        .map(|(_, spread)| spread.upper)
        .fold(1.0, f64::max);
    let width = 160 + BAR * u32::try_from(columns)?;
    let root = SVGBackend::with_string(into, (width.max(480), 420)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(12)
        .caption(format!("requests per second, {} = 1", first.name()), ("sans-serif", 16))
        .x_label_area_size(96)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..columns as f64, 0.0..highest * 1.1)?;
    chart.configure_mesh().disable_x_mesh().x_labels(0).draw()?;
    let vertical = ("sans-serif", 11).into_font().transform(FontTransform::Rotate90);
    chart.draw_series(measured.iter().enumerate().map(|(case, measured)| {
        // Below the axis.
        let at = ((case * group) as f64 + group as f64 / 2.0, -0.02 * highest);
        Text::new(measured.case.name.clone(), at, vertical.clone())
    }))?;
    for (bar, target) in targets.iter().enumerate() {
        let color = Palette99::pick(bar).to_rgba();
        let left = |case: usize| (case * group + bar) as f64;
        let rectangles = of(*target).map(|(case, spread)| {
            let (from, to) = (left(case) + 0.1, left(case) + 0.9);
            Rectangle::new([(from, 0.0), (to, spread.median)], color.filled())
        });
        chart
            .draw_series(rectangles)?
            .label(target.name())
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 10, y + 5)], color.filled()));
        chart.draw_series(of(*target).map(|(case, spread)| {
            let at = left(case) + 0.5;
            PathElement::new(vec![(at, spread.lower), (at, spread.upper)], BLACK)
        }))?;
    }
    chart.draw_series([PathElement::new(vec![(0.0, 1.0), (columns as f64, 1.0)], BLACK)])?;
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{Run, Target, case};
    use super::*;

    #[test]
    fn a_picture_has_a_bar_for_each_target_and_the_names_of_both() {
        let run = |iops| Run { iops, rate: 0.0, cpu_us: 0.0, switches: 0.0, written: f64::NAN };
        let cases = case::choose(&["randread-4k-1".to_owned()], false).unwrap();
        let measured: Vec<Measured> = cases
            .into_iter()
            .map(|case| Measured {
                case,
                runs: vec![
                    (Target::Raw, vec![run(100.0), run(90.0)]),
                    (Target::Postern, vec![run(80.0), run(85.0)]),
                    (Target::IoUring, vec![run(70.0), run(75.0)]),
                ],
            })
            .collect();
        let svg = ratios(&measured, Target::Raw).unwrap();
        assert!(svg.starts_with("<svg"));
        for word in ["postern", "io-uring", "randread-4k-128"] {
            assert!(svg.contains(word), "{word}");
        }
        // The ground, the legend's frame and keys, and a bar for each target of three cases.
        assert!(svg.matches("<rect").count() >= 3 * 2 + 2);
    }
}
