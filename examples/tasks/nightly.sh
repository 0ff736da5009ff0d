#!/bin/sh
# Answers of the night, for cron:
#   15 2 * * *  /opt/eightfold/nightly.sh /srv/models/default /srv/in /srv/out
# Each *.jsonl of IN is answered into OUT. A night that was cut short goes on in the next: `run` resumes where it stopped, and
# what is done is moved away only then. Two nights never run at once.
set -eu
model=$1 in=$2 out=$3
mkdir -p "$in/done" "$out"
exec 9> "$out/.lock"
flock -n 9 || { echo "nightly: the last night still runs" >&2; exit 0; }
for file in "$in"/*.jsonl; do
  [ -e "$file" ] || continue
  name=$(basename "$file")
  eightfold run "$model" --input-file "$file" --output-file "$out/$name"
  mv "$file" "$in/done/$name"
done
