"""Prepare educational text that a language model writes for you, through any server with the OpenAI API.

    python data/prepare-knowledge.py --api_url http://localhost:11434/v1 --model llama3.2 --documents 1000

prints, besides the progress and the costs:

    knowledge: written by llama3.2 from topics of data/knowledge-topics.json
    licence: not stated: see the terms of the model (state it with --licence)
    train: about 950 documents, 300,000 tokens in knowledge-train.bin
    val: about 50 documents, 16,000 tokens in knowledge-val.bin

The server may be Ollama, llama.cpp, vLLM, a hosted service or serve.py. Each answer is written to
data/knowledge-answers.jsonl as it arrives: after Ctrl-C or a crash the same command continues, and nothing is asked
twice. Refusals, repeats, near repeats, answers that are cut off and other languages are left out and counted. The
wording of the requests is in data/knowledge-prompts.json. For conversations, and for answers to questions:

    python data/prepare-knowledge.py --api_url http://localhost:11434/v1 --model llama3.2 --as chat --name lessons
    python data/prepare-knowledge.py --api_url http://localhost:11434/v1 --model llama3.2 --source squad --as chat

Then run: python train.py --dataset knowledge
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the project's modules are found anywhere

from tqdm import tqdm

from common.cli import UserError, option, parse_options, run_script
from data.advice import print_advice
from data.cleaning import CHAT_PASSES, TEXT_PASSES
from data.dataset import DatasetInfo, check_name
from data.documents import Document
from data.knowledge.client import Client, Retries, models_of, require_http
from data.knowledge.collect import Collector
from data.knowledge.costs import Costs, parse_price
from data.knowledge.filters import Selection, document_of
from data.knowledge.journal import Answer, Journal
from data.knowledge.plan import Request, plan
from data.knowledge.prompts import Prompts, read_prompts
from data.knowledge.topics import Question, Topic, read_questions, read_topics, text_lines
from data.pipeline import DATA_FOLDER, Corpus, Dataset, PrepareOptions, output_folder, prepare
from data.readers.files import is_text
from data.readers.hub import fetch_data_files
from data.readers.inputs import input_files
from data.readers.records import read_records
from data.sources import SOURCES

PROMPTS, TOPICS = DATA_FOLDER / "knowledge-prompts.json", DATA_FOLDER / "knowledge-topics.json"
N_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class KnowledgeOptions(PrepareOptions):
    api_url: str | None = option(
        None, "address of the server, such as http://localhost:11434/v1 for Ollama (default: $OPENAI_BASE_URL)",
        group="server", metavar="URL",
    )  # fmt: skip
    api_key: str | None = option(None, "key of a hosted service (default: $OPENAI_API_KEY)", group="server")
    model: str | None = option(None, "model that writes (default: the server's, if it has only one)", group="server")
    concurrency: int = option(4, "requests sent at the same time", at_least=1, group="server")
    retries: int = option(6, "retries after an error that may be temporary", at_least=0, group="server")
    timeout: float = option(600.0, "seconds until a request without an answer is tried again", above=0, group="server")
    max_tokens: int = option(1000, "longest answer; answers cut off there are left out", at_least=1, group="server")
    temperature: float | None = option(None, "temperature (default: the server's)", at_least=0, group="server")
    price: str | None = option(
        None, "price per million input and output tokens, such as 0.15,0.60, to show the cost", group="server",
        metavar="IN,OUT",
    )  # fmt: skip
    documents: int = option(1000, "number of documents to collect", at_least=1, group="documents")
    as_: str = option("text", "what the model writes", choices=("text", "chat"), group="documents")
    source: str = option("topics", "where the requests come from", choices=("topics", "squad"), group="documents")
    topics: str | None = option(
        None, "file of topics, one per line or by subject and age (default: data/knowledge-topics.json)",
        group="documents", metavar="FILE",
    )  # fmt: skip
    questions: str | None = option(
        None, "file of questions: one per line, or records with question and context", group="documents",
        metavar="FILE",
    )  # fmt: skip
    prompts: str | None = option(
        None, "file with the wording of the requests (default: data/knowledge-prompts.json)", group="documents",
        metavar="FILE",
    )  # fmt: skip
    any_language: bool = option(False, "keep texts that are not English", group="documents")
    name: str = option("knowledge", "name of the data set", group="documents")
    licence: str | None = option(None, "licence kept with the data set (default: not stated)", group="documents")
    ask: bool = option(True, "ask the server; --no-ask prepares the answers collected so far", group="documents")
    dry_run: bool = option(False, "show the first requests and stop, without asking", group="documents")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.name)
        if self.price is not None:
            parse_price(self.price)
        if sum([self.topics is not None, self.questions is not None, self.source != "topics"]) > 1:
            raise ValueError("--topics, --questions and --source squad cannot be combined; give one of them")


def main(first_wait_s: float = Retries.first_wait_s) -> None:
    options = parse_options(KnowledgeOptions, __doc__)
    if options.input:
        raise UserError(
            "prepare-knowledge.py reads no --input; for files that you have run: "
            "python prepare_with_extended_tokenizer.py --input FILE --name NAME"
        )
    require_http()
    prompts = read_prompts(Path(options.prompts or PROMPTS))
    sources = read_sources(options, prompts)
    client = make_client(options, first_wait_s)
    requests = plan(sources, prompts, options.as_ == "chat", client.model, options.seed)
    if options.dry_run:
        show_requests(requests, len(sources), options)
        return
    folder = output_folder(options)
    with Journal(folder / f"{options.name}-answers.jsonl") as journal:
        selection = collect(options, client, journal, requests)
        info = prepare_documents(options, client, journal, selection)
    print_advice(info, options.output_dir)


# --- what to ask, and which server ---


def read_sources(options: KnowledgeOptions, prompts: Prompts) -> Sequence[Topic] | Sequence[Question]:
    """The topics or questions that the options name."""
    if options.source == "squad":
        questions = [
            question for file in fetch_data_files(SOURCES["squad"]) for question in read_questions(read_records(file))
        ]
    elif options.questions is None:
        return read_topics(Path(options.topics or TOPICS), prompts.readers)
    else:
        (file,) = input_files([options.questions])
        records = ({"question": line} for line in text_lines(file)) if is_text(file) else read_records(file)
        questions = list(read_questions(records))
    if not questions:
        raise UserError(f"{options.questions or 'SQuAD'} contains no question; give --questions one per line")
    return questions


def make_client(options: KnowledgeOptions, first_wait_s: float) -> Client:
    """The client of the server that the options or the environment name."""
    api_url = (options.api_url or os.environ.get("OPENAI_BASE_URL") or "").strip().rstrip("/")
    api_url = api_url.removesuffix("/chat/completions")
    if not api_url and (options.ask and not options.dry_run):
        raise UserError(
            "no server given; for Ollama add: --api_url http://localhost:11434/v1 (OpenAI: https://api.openai.com/v1)"
        )
    if api_url and (urlsplit(api_url).scheme not in ("http", "https") or not urlsplit(api_url).netloc):
        raise UserError(f"--api_url {api_url} is not an address; it looks like http://localhost:11434/v1")
    client = Client(
        api_url,
        options.api_key or os.environ.get("OPENAI_API_KEY"),
        options.model or "",
        options.max_tokens,
        options.temperature,
        options.timeout,
        Retries(options.retries + 1, first_wait_s),
    )
    if not client.model and not options.dry_run:
        if not options.ask:
            raise UserError("--no-ask needs --model, the model whose answers are to be prepared")
        client.model = only_model(client)
    return client


def only_model(client: Client) -> str:
    """The server's model, if it has only one; otherwise raises UserError, which lists them."""
    models = models_of(client)
    if len(models) != 1:
        names = ", ".join(models[:20]) or "none"
        raise UserError(f"{client.api_url} has several models or none ({names}); name one with --model")
    print(f"model: {models[0]}")
    return models[0]


def show_requests(requests: Iterator[Request], n_sources: int, options: KnowledgeOptions) -> None:
    """Print the first requests of the plan."""
    for request, _ in zip(requests, range(N_SHOWN), strict=False):
        print(f"--- {request.form}, for age {request.reader} ---\n{request.messages[-1]['content']}\n")
    print(f"{n_sources:,} {'topics' if not is_about_questions(options) else 'questions'}; no request was sent")
    if options.price:
        most = options.documents * options.max_tokens * parse_price(options.price)[1] / 1e6
        print(f"{options.documents:,} answers of at most {options.max_tokens:,} tokens cost at most {most:.2f}")


def is_about_questions(options: KnowledgeOptions) -> bool:
    return options.questions is not None or options.source == "squad"


# --- asking ---


def collect(options: KnowledgeOptions, client: Client, journal: Journal, requests: Iterator[Request]) -> Selection:
    """Collect answers until there are enough documents; prints the progress, what was left out and the costs."""
    price = parse_price(options.price) if options.price else None
    costs, selection = Costs(), Selection(options.any_language)
    print(f"{journal.path}: {len(journal):,} answers so far")
    with tqdm(total=options.documents, desc=options.name, unit="answer", disable=None) as bar:

        def on_answer(_: Request, answer: Answer) -> None:
            costs.add(answer)
            bar.update()
            bar.set_postfix_str(costs.in_words(price).partition(", ")[2], refresh=False)
            if bar.disable and costs.answers % max(1, options.documents // 10) == 0:
                print(f"  {costs.in_words(price)}", flush=True)

        collector = Collector(client, journal, selection, options.concurrency, on_answer)
        try:
            if options.ask:
                collector.collect(requests, options.documents)
            else:
                collector.select(requests, options.documents)
        finally:
            bar.close()
            print(f"this run: {costs.in_words(price)}; retries: {client.n_retries:,}")
            if collector.costs.answers > costs.answers:
                print(f"with earlier runs: {collector.costs.in_words(price)}")
            if sys.exc_info()[0] is KeyboardInterrupt:
                print(f"stopped with {len(journal):,} answers in {journal.path}; the same command continues")
            for reason, count in collector.failures.most_common():
                print(f"  {reason}: {count:,}")
    if not selection.kept:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in selection.counts.most_common())
        raise UserError(f"no document in {journal.path} ({reasons or 'no answer'}); change --model or --prompts")
    if len(selection.kept) < options.documents:
        print(f"{len(selection.kept):,} documents; there are no more answers to choose from")
    return selection


def prepare_documents(options: KnowledgeOptions, client: Client, journal: Journal, selection: Selection) -> DatasetInfo:
    """Run the documents through the pipeline of every prepare script; returns the description of the data set."""
    origin = (
        f"SQuAD questions ({SOURCES['squad'][0].repository})"
        if options.source == "squad"
        else "topics of data/knowledge-topics.json"
    )
    own_file = options.topics or options.questions
    source = f"written by {client.model} from {Path(own_file).name if own_file else origin}"
    licence = options.licence or "not stated: see the terms of the model (state it with --licence)"
    dataset = Dataset(options.name, options.as_, source, licence)
    digest = hashlib.sha256()
    for document in documents(journal, selection):
        digest.update(json.dumps(document).encode())
    # Only the options of every preparation are recorded with the data, so no key and no address.
    shared = {field.name: getattr(options, field.name) for field in dataclasses.fields(PrepareOptions)}
    corpus = Corpus(documents(journal, selection), digest=digest.hexdigest(), skipped=selection.counts)
    passes = CHAT_PASSES if options.as_ == "chat" else TEXT_PASSES
    return prepare(dataset, PrepareOptions(**shared), corpus, passes)


def documents(journal: Journal, selection: Selection) -> Iterator[Document]:
    """The documents that were selected, in the order of the plan."""
    for request in selection.kept:
        answer = journal.answer(request.key)
        assert answer is not None
        document = document_of(request, answer)
        assert document is not None
        yield document


if __name__ == "__main__":
    run_script(main)
