//! `pgkeep links`: PGHoard's names for this program.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use serde_json::json;

use super::pghoard::PROGRAMS;
use super::{Context, Exit, Failure, render};

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct LinksArgs {
    /// Directory to put the links into
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

const EXAMPLES: &str = "\
Started through one of these links, the program is PGHoard's: it takes the
same options, prints the same and exits the same. What lies there under one of
the names and is no link to this program is left alone.

Examples:
  pgkeep links /usr/local/bin
  pgkeep links /usr/bin --json";

/// What stands at a name now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Free,
    Ours,
    Foreign,
}

pub fn run(args: &LinksArgs, context: &Context) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("cannot find out where this program lies")?;
    let links: Vec<PathBuf> = PROGRAMS.iter().map(|(name, _)| args.directory.join(name)).collect();
    let mut free = Vec::new();
    for link in &links {
        match standing(link, &program).with_context(|| format!("cannot look at `{}`", link.display()))? {
            Standing::Free => free.push(link),
            Standing::Ours => {}
            Standing::Foreign => {
                let text = format!("`{}` is something else; nothing was changed", link.display());
                let hint = "remove it first, or name another directory";
                return Err(Failure::new(Exit::Failure, text).with_hint(hint).into());
            }
        }
    }
    fs::create_dir_all(&args.directory)
        .with_context(|| format!("cannot make `{}`", args.directory.display()))?;
    for link in &free {
        symlink(&program, link).with_context(|| format!("cannot make `{}`", link.display()))?;
    }
    if context.json() {
        let names =
            |links: &[&PathBuf]| links.iter().map(|link| link.display().to_string()).collect::<Vec<_>>();
        let all: Vec<&PathBuf> = links.iter().collect();
        return render::json(
            &json!({ "program": program.display().to_string(), "links": names(&all), "made": names(&free) }),
        );
    }
    for link in &links {
        let made = if free.contains(&link) { "" } else { " (was there)" };
        render::line(format_args!("{} -> {}{made}", link.display(), program.display()))?;
    }
    Ok(())
}

fn standing(link: &Path, program: &Path) -> io::Result<Standing> {
    match link.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Standing::Free),
        Err(error) => Err(error),
        // A link to where the program was is ours too, but leads nowhere now.
        Ok(metadata) if metadata.is_symlink() => {
            let same = match (link.canonicalize(), program.canonicalize()) {
                (Ok(there), Ok(here)) => there == here,
                _ => fs::read_link(link)? == program,
            };
            Ok(if same { Standing::Ours } else { Standing::Foreign })
        }
        Ok(_) => Ok(Standing::Foreign),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_link_to_this_program_is_ours() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let program = path("pgkeep");
        fs::write(&program, "").unwrap();
        assert_eq!(standing(&path("pghoard"), &program).unwrap(), Standing::Free);
        symlink("pgkeep", path("pghoard")).unwrap();
        assert_eq!(standing(&path("pghoard"), &program).unwrap(), Standing::Ours);
        fs::write(path("pghoard_restore"), "#!/usr/bin/python3").unwrap();
        assert_eq!(standing(&path("pghoard_restore"), &program).unwrap(), Standing::Foreign);
        symlink("/nowhere", path("pghoard_create_keys")).unwrap();
        assert_eq!(standing(&path("pghoard_create_keys"), &program).unwrap(), Standing::Foreign);
    }
}
